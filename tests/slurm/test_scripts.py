"""The job scripts as they are shipped."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES
from tests.slurm.runs import SCRIPTS
from trainer.capabilities import world_conflicts
from trainer.recipes import RECIPES

JOBS = sorted(SCRIPTS.glob("*.sh"))
PRETRAIN = [path for path in JOBS if path.name.startswith("pretrain_")]


def recipe_of(script: Path) -> str:
    (name,) = re.findall(r"launcher\.job (\S+) \"\$@\"", script.read_text())
    return name


def option(script: Path, name: str) -> str:
    (value,) = re.findall(rf"^#SBATCH --{name}=(.*)$", script.read_text(), re.MULTILINE)
    return value


def test_every_recipe_has_a_script():
    assert sorted(map(recipe_of, PRETRAIN)) == sorted(set(RECIPES) - {"demo"})


def test_the_scripts_differ_in_what_they_run_and_on_how_many_nodes_alone():
    texts = set()
    for script in PRETRAIN:
        text = script.read_text().split("\n", 2)[2].replace(recipe_of(script), "RECIPE")
        texts.add(re.sub(r"--nodes=\d+", "--nodes=N", text))
        assert (
            script.read_text().split("\n")[1].endswith(f"slurm/{script.name} [--optim.lr 2e-3 ...]")
        )
    assert len(texts) == 1


@pytest.mark.parametrize("script", PRETRAIN, ids=lambda path: path.stem)
def test_the_recipe_runs_on_the_scripts_nodes(script):
    config = RECIPES[recipe_of(script)]()
    world_size = int(option(script, "nodes")) * int(option(script, "ntasks-per-node"))
    assert list(world_conflicts(config, world_size)) == []
    assert option(script, "job-name") == config.recipe


def test_slurm_takes_every_script(cluster):
    for script in JOBS:
        if script.name not in ("env.sh", "finetune.sh"):
            nodes = min(len(NODES), int(option(script, "nodes")))
            cluster.run("sbatch", "--test-only", f"--nodes={nodes}", str(script))


def test_a_script_finds_its_folder_wherever_it_lies(cluster, tmp_path):
    there = tmp_path / "a b" / "c $(touch x)" / "slurm"
    there.mkdir(parents=True)
    shutil.copy(SCRIPTS / "pretrain_base.sh", there)
    (there / "env.sh").write_text('echo "$BASH_SOURCE"; exit\n')
    for arguments in ([], ["--optim.lr", "a  b"], ["$(touch y)", "; touch z", "`'\""]):
        options = ["--output=said", "--nodes=1"]
        script = there / "pretrain_base.sh"
        job = cluster.submit(script, *arguments, options=options, folder=tmp_path)
        cluster.wait(job, "COMPLETED")
        assert (tmp_path / "said").read_text() == f"{there / 'env.sh'}\n"
        (tmp_path / "said").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: `make system` does so as root")
    done = subprocess.run(
        ["shellcheck", "--external-sources", f"slurm/{script.name}"],
        cwd=SCRIPTS.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
