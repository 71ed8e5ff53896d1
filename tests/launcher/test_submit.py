"""What `foveate submit` checks and writes; `tests/slurm` submits to a real cluster."""

from __future__ import annotations

import itertools
import shlex
import subprocess

import pytest

from launcher import submit
from launcher.__main__ import main
from launcher.resources import Resources
from trainer.config import UserError

DATA = [
    *("--data.source", "synthetic", "--data.train", "num_samples=32,num_classes=10,size=32"),
    *("--data.val", "num_samples=16,num_classes=10,size=32", "--train.batch-size", "8"),
]
CPU = ["--gpus-per-node", "0", "--ntasks-per-node", "2"]
HOSTILE = "$(touch x); \"`touch y`' @CODE@\n#SBATCH --nodes=7\n"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry_run(capsys, *arguments: str) -> str:
    assert main(["submit", "demo", "--dry-run", *DATA, *arguments]) == 0
    return capsys.readouterr().out


def options(script: str) -> dict[str, str]:
    """Return the options that sbatch reads: those before the first command."""
    header = itertools.takewhile(lambda line: not line or line[0] == "#", script.splitlines())
    lines = [line for line in header if line.startswith("#SBATCH ")]
    words = (shlex.split(line)[1].removeprefix("--").partition("=") for line in lines)
    return {name: value for name, _, value in words}


def test_a_dry_run_prints_the_script_and_makes_nothing(folder, capsys):
    more = ["--sbatch", "exclusive", "--sbatch", "signal=B:USR1@900"]
    script = dry_run(capsys, "--nodes", "3", *CPU, "--time", "2-0", "--qos", "long", *more)
    run = folder / "runs" / "demo"
    assert options(script) == {
        "job-name": "demo",
        "nodes": "3",
        "ntasks-per-node": "2",
        "cpus-per-task": "1",
        "time": "2-0",
        "qos": "long",
        "signal": "B:USR1@900",
        "requeue": "",
        "open-mode": "append",
        "exclusive": "",
        "output": f"{run}/logs/slurm-%j.out",
    }
    assert script.splitlines()[-1].startswith("exec python -m launcher.job demo --data.source ")
    assert script.splitlines()[-1].endswith(f"--run-dir {run}")
    assert f"source {run}/code/slurm/env.sh" in script
    assert list(folder.iterdir()) == []


def test_a_gpu_of_the_published_recipes_has_a_process_and_its_threads_cores():
    resources = Resources(
        nodes=4, gpus_per_node=8, ntasks_per_node=None, cpus_per_task=None, time=None,
        partition=None, account=None, qos=None, mem=None, constraint=None,
    )  # fmt: skip
    assert resources.options(num_workers=12) == {
        "nodes": "4",
        "ntasks-per-node": "8",
        "cpus-per-task": "12",
        "gpus-per-node": "8",
    }


def test_what_a_user_types_never_becomes_a_command(folder, capsys):
    """The script's own shell reads it, with a driver that writes down what reaches it."""
    hostile = ["--checkpoint.local-dir", f"/tmp/{HOSTILE}", "--run-dir", "a b"]
    script = dry_run(capsys, "--nodes", "1", *CPU, *hostile)
    assert options(script)["nodes"] == "1"
    environment = folder / "a b" / "code" / "slurm" / "env.sh"
    environment.parent.mkdir(parents=True)
    environment.write_text("python() { printf '%s\\0' \"$@\"; }\n")
    runnable = script.replace("\nexec python", "\npython")
    done = subprocess.run(
        ["bash"], input=runnable, capture_output=True, text=True, check=True, cwd="/"
    )
    reached = done.stdout.split("\0")[:-1]
    assert reached[:3] == ["-m", "launcher.job", "demo"]
    assert reached[3 : 3 + len(DATA)] == DATA
    assert reached[-6:-2] == hostile
    assert reached[-2:] == ["--run-dir", str(folder / "a b")]
    assert list(folder.iterdir()) == [folder / "a b"]


def test_a_sweep_has_a_run_for_each_combination(folder, capsys):
    grid = ["--sweep", "optim.lr=1e-3,2e-3", "--sweep", "optim.betas=0.9 0.99,0.9 0.95"]
    out = dry_run(capsys, "--nodes", "1", *CPU, "--run-dir", "grid", *grid)
    array, *scripts = (f"#!/bin/bash{text}" for text in out.split("#!/bin/bash")[1:])
    assert options(array)["array"] == "0-3"
    assert options(array)["output"] == f"{folder}/grid-%a/logs/slurm-%A_%a.out"
    assert 'grid-"$SLURM_ARRAY_TASK_ID"/job.sbatch' in array
    assert len(scripts) == 4
    last = scripts[3].rstrip()
    assert last.endswith(f"--optim.lr 2e-3 --optim.betas 0.9 0.95 --run-dir {folder / 'grid-3'}")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demoo", "--nodes", "1"], ["unknown recipe demoo", "did you mean demo?"]),
        (["demo"], ["--nodes", "foveate submit RECIPE --help"]),
        (["demo", "--nodes", "x"], ["--nodes", "'x'"]),
        (["demo", "--nodes", "0"], ["--nodes is 0"]),
        (["demo", "--nodes", "1", "--optim.lrr", "1"], ["--optim.lrr", "--optim.lr?"]),
        (["demo", "--nodes", "1", "--sweep", "optim.lrr=1"], ["--optim.lrr", "--optim.lr?"]),
        (["demo", "--nodes", "1", "--sweep", "optim.lr"], ["--sweep optim.lr:", "VALUE,VALUE"]),
        (["demo", "--nodes", "1", "--sweep", "optim.lr=1,"], ["--sweep optim.lr=1,:"]),
        (["demo", "--nodes", "1", "--chain", "0"], ["--chain is 0"]),
        (["demo", "--nodes", "1", "--chain", "2", "--sweep", "optim.lr=1"], ["--chain", "--sweep"]),
        (["demo", "--nodes", "1", "--gpus-per-node", "0"], ["--ntasks-per-node"]),
        (["demo", "--nodes", "1", "--cpus-per-task", "0"], ["--cpus-per-task is 0"]),
        (["demo", "--nodes", "1", "--time", "soon"], ["--time is soon", "HOURS:MINUTES:SECONDS"]),
        (["demo", "--nodes", "1", "--partition", 'a" -x'], ["--partition", "characters"]),
        (["demo", "--nodes", "1", "--account", "a\n"], ["--account", "characters"]),
        (["demo", "--nodes", "1", "--sbatch", "array=0-9"], ["--sbatch array=0-9"]),
        (["demo", "--nodes", "1", "--sbatch", "nodes=2"], ["--sbatch nodes=2"]),
        (["demo", "--nodes", "1", "--sbatch", "$(x)=2"], ["--sbatch $(x)=2"]),
        (["demo", "--nodes", "1", "--run-dir", '$(touch x); "'], ["run folder", "letters"]),
        (["demo", "--nodes", "1", "--run-dir", "100%"], ["run folder", "letters"]),
        (
            ["demo", "--nodes", "2", *CPU, "--backend.replicas", "3"],
            ["backend.replicas 3", "4 processes"],
        ),
        (["demo", "--nodes", "1", "--dry-run"], ["datasets/cifar10/train", "is missing"]),
        (
            ["demo", "--nodes", "1", "--dry-run", *DATA, "--train.batch-size", "64"],
            ["32 samples", "64"],
        ),
    ],
)
def test_mistakes_are_one_line_and_make_nothing(folder, capfd, arguments, parts):
    assert main(["submit", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert list(folder.iterdir()) == []


def test_without_slurm_it_says_so_before_it_makes_anything(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(folder))
    assert main(["submit", "demo", "--nodes", "1", *DATA]) == 2
    assert "squeue is not on this machine" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("time", "is_enough"),
    [
        *(("5", False), ("6", True), ("5:00", False), ("5:01", True), ("0:05:00", False)),
        *(("1:00:00", True), ("0-0", False), ("0-1", True), ("0-0:05", False), ("0-0:06", True)),
        *(("1-00:00:00", True), ("infinite", True)),
    ],
)
def test_a_time_limit_must_leave_time_before_the_warning(time, is_enough):
    resources = Resources(
        nodes=1, gpus_per_node=1, ntasks_per_node=None, cpus_per_task=None, time=time,
        partition=None, account=None, qos=None, mem=None, constraint=None,
    )  # fmt: skip
    if is_enough:
        resources.check()
    else:
        with pytest.raises(UserError, match=f"--time is {time}"):
            resources.check()


def test_help_names_every_option(capsys):
    assert main(["submit", "--help"]) == 0
    assert capsys.readouterr().out == submit.USAGE
