from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import rundir
from launcher.local import python_environment
from trainer.config import RunConfig
from trainer.recipes import RECIPES, recipe

# Installed so early that nothing can import torch: what a login node without it would see.
WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "triton", "numpy"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from launcher.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def foveate(*arguments: str, cwd: Path | None = None, **environment: str):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        env={**python_environment(rundir.CODE), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_user_error(done, *parts: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_the_commands(arguments):
    done = foveate(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("pretrain", "export", "data", "demo"):
        assert f"\n  {command}" in done.stdout


def test_help_lists_the_recipes():
    done = foveate("pretrain", "--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in RECIPES)


def test_help_lists_every_setting_of_a_recipe():
    done = foveate("pretrain", "transnext_base", "--help")
    assert done.returncode == 0
    assert "--model.drop-path" in done.stdout
    assert "(default: 0.6)" in done.stdout
    assert "--nproc" in done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_print_config_prints_the_recipe(name, tmp_path):
    done = foveate("pretrain", name, "--print-config", cwd=tmp_path)
    assert done.returncode == 0
    assert RunConfig.from_json(done.stdout) == recipe(name)
    assert list(tmp_path.iterdir()) == []


def test_overrides_are_applied_in_any_order():
    done = foveate(
        *("pretrain", "demo", "--optim.lr", "1e-4", "--print-config"),
        *("--data.crop-scale", "0.5", "1", "--memory.compile", "--nproc", "4"),
    )
    config = json.loads(done.stdout)
    assert config["optim"]["lr"] == 1e-4
    assert config["data"]["crop_scale"] == [0.5, 1.0]
    assert config["memory"]["compile"] is True


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["pretran"], ["unknown command pretran", "did you mean pretrain?"]),
        (["pretrain"], ["which recipe?", "transnext_base"]),
        (["pretrain", "transnext_bse"], ["transnext_bse", "did you mean transnext_base?"]),
        (["pretrain", "--optim.lr", "1"], ["which recipe?"]),
        (["pretrain", "transnext_base", "--optim.lrr", "1"], ["--optim.lrr", "--optim.lr?"]),
        (["pretrain", "demo", "--optim.lr", "fast"], ["--optim.lr", "'fast'"]),
        (["pretrain", "demo", "--optim.lr"], ["--optim.lr"]),
        (["pretrain", "demo", "--optim.lr", "-1"], ["optim.lr is -1.0", "above 0"]),
        (["pretrain", "demo", "--nproc", "two"], ["--nproc", "'two'"]),
        (["pretrain", "demo", "--nproc", "0"], ["--nproc is 0"]),
        (["pretrain", "demo", "stray"], ["stray"]),
        (["demo", "--optim.lrr", "1"], ["--optim.lrr", "--optim.lr?"]),
    ],
)
def test_a_mistake_is_one_line(arguments, parts, tmp_path):
    assert_user_error(foveate(*arguments, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    config = rundir.prepare(recipe_in(tmp_path / "a"))
    done = foveate("pretrain", "demo", "--run-dir", str(config), "--optim.lr", "1")
    assert_user_error(done, str(tmp_path / "a"), f"optim.lr is {recipe('demo').optim.lr}, not 1.0")


def recipe_in(folder: Path) -> RunConfig:
    return RunConfig.from_json(
        recipe("demo").to_json().replace('"runs/demo"', json.dumps(str(folder)))
    )


def test_pretrain_is_not_a_worker_command(tmp_path):
    done = foveate(
        *("pretrain", "demo", "--run-dir", str(tmp_path / "a")),
        RANK="1",
        WORLD_SIZE="2",
        LOCAL_RANK="1",
        MASTER_ADDR="localhost",
        MASTER_PORT="1",
    )
    assert_user_error(done, "run it once, without torchrun or srun")


def test_other_commands_get_their_arguments_and_give_their_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "data", "pack", "nowhere"],
        env=python_environment(rundir.CODE),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "usage: foveate data pack" in done.stderr


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (["--help"], ["pretrain", "transnext_base", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            env=python_environment(rundir.CODE),
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert (done.returncode, done.stderr) == (128 + 13, "")
    os.close(writer)


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("foveate")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, cwd=os.sep)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: foveate COMMAND")
