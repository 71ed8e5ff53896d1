from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import rundir
from launcher.local import python_environment
from tests.trainer.disk import on_small_disk
from trainer.config import RunConfig, UserError, override
from trainer.recipes import recipe


def _config(folder: Path, *overrides: str) -> RunConfig:
    return override(recipe("demo"), ["--run-dir", str(folder), *overrides])


def test_a_run_folder_holds_what_it_takes_to_run_again(tmp_path):
    run = rundir.prepare(_config(tmp_path / "runs" / "a"))
    assert {path.name for path in run.iterdir()} == {
        *("config.json", "environment.txt", "code", "logs")
    }
    assert {path.name for path in (run / "code").iterdir()} == set(rundir.PACKAGES)
    code = {path.relative_to(run / "code") for path in (run / "code").rglob("*.py")}
    assert code == {
        path.relative_to(rundir.CODE)
        for package in rundir.PACKAGES
        for path in (rundir.CODE / package).rglob("*.py")
    }
    assert not list((run / "code").rglob("__pycache__"))
    environment = (run / "environment.txt").read_text()
    assert environment.startswith("python 3.")
    assert "\ncommit " in environment
    assert "\ntorch==" in environment


def test_the_frozen_code_runs_without_the_checkout(tmp_path):
    run = rundir.prepare(_config(tmp_path / "a"))
    told = "import launcher.rundir, trainer.recipes; print(launcher.rundir.CODE)"
    done = subprocess.run(
        [sys.executable, "-c", told],
        env=python_environment(run / "code"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == run / "code"


def test_paths_in_a_run_folder_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = override(recipe("demo"), ["--run-dir", "a", "--data.val", "s3://bucket/val"])
    stored = json.loads((rundir.prepare(config) / "config.json").read_text())
    assert stored["run_dir"] == str(tmp_path / "a")
    assert stored["data"]["train"] == str(tmp_path / "datasets/cifar10/train")
    assert stored["data"]["val"] == "s3://bucket/val"


def test_the_count_of_synthetic_images_is_no_path(tmp_path):
    config = _config(tmp_path / "a", "--data.source", "synthetic", "--data.train", "640")
    assert rundir.absolute(config).data.train == "640"


def test_the_same_run_continues_with_its_frozen_code(tmp_path):
    run = rundir.prepare(_config(tmp_path / "a"))
    (run / "code" / "trainer" / "mark.py").write_text("")
    (run / "metrics.jsonl").write_text("{}\n")
    assert rundir.prepare(_config(tmp_path / "a")) == run
    assert (run / "code" / "trainer" / "mark.py").exists()
    assert (run / "metrics.jsonl").read_text() == "{}\n"


def test_how_a_run_is_computed_may_change_on_its_way(tmp_path):
    rundir.prepare(_config(tmp_path / "a"))
    changed = _config(
        *(tmp_path / "a", "--backend.name", "ddp", "--memory.checkpointing", "full"),
        *("--train.accumulate", "2", "--data.num-workers", "3", "--log.every", "7"),
        *("--data.train", str(tmp_path / "moved")),
    )
    run = rundir.prepare(changed)
    stored = (run / "config.json").read_text()
    assert RunConfig.from_json(stored) == rundir.absolute(changed)


def test_what_a_run_computes_may_not_change(tmp_path):
    run = rundir.prepare(_config(tmp_path / "a"))
    before = (run / "config.json").read_text()
    with pytest.raises(UserError) as error:
        rundir.prepare(_config(tmp_path / "a", "--optim.lr", "1.0", "--model.drop-path", "0.5"))
    message = str(error.value)
    assert f"optim.lr is {recipe('demo').optim.lr}, not 1.0" in message
    assert "model.drop_path is 0.0, not 0.5" in message
    assert "--run-dir" in message
    assert (run / "config.json").read_text() == before


@pytest.mark.parametrize("content", ["file", "folder", "half"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, content):
    path = tmp_path / "a"
    if content == "file":
        path.write_text("precious")
    elif content == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("precious")
    else:
        path.mkdir()
        (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not a run folder"):
        rundir.prepare(_config(path))
    assert path.is_file() or len(list(path.iterdir())) == 1


def test_an_empty_folder_may_become_a_run(tmp_path):
    (tmp_path / "a").mkdir()
    assert (rundir.prepare(_config(tmp_path / "a")) / "code").is_dir()


def test_a_run_of_another_version_goes_on_by_the_command_that_its_refusal_names(tmp_path):
    """The newer version has one more setting."""
    run = rundir.prepare(_config(tmp_path / "a run"))
    newer = tmp_path / "newer"
    shutil.copytree(run / "code", newer)
    config = newer / "trainer" / "sections.py"
    config.write_text(
        config.read_text().replace("    lr: float", "    new: int = 1\n    lr: float")
    )
    arguments = ["pretrain", "demo", "--prepare", "--run-dir", str(run)]
    refused = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        env=python_environment(newer),
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "another version of Foveate (missing setting optim.new)" in refused.stderr
    command = refused.stderr.partition(", by ")[2].partition(" in place of foveate")[0]
    done = subprocess.run(
        ["bash", "-c", f'{command} "$@"', "-", *arguments],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=newer,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("export PYTHONPATH=")


def test_a_damaged_configuration_is_named(tmp_path):
    run = rundir.prepare(_config(tmp_path / "a"))
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"a/config\.json is not a run configuration"):
        rundir.prepare(_config(tmp_path / "a"))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        rundir.prepare(_config(tmp_path / "file" / "a"))


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    prepare = [sys.executable, "-m", "launcher", "pretrain", "demo", "--prepare"]
    # The shell looks at the disk before it is gone.
    look = ["sh", "-c", '"$@"; code=$?; ls -A "$0"; exit $code', str(tmp_path), *prepare]
    done = subprocess.run(
        on_small_disk(tmp_path, [*look, "--run-dir", str(tmp_path / "a")], num_bytes=100_000),
        env=python_environment(rundir.CODE),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write the run folder {tmp_path / 'a'}: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "", "nothing is left behind"


def _prepare(folder: str, decay: float, start, answers) -> None:
    config = dataclasses.replace(recipe("demo"), run_dir=folder)
    optim = dataclasses.replace(config.optim, weight_decay=decay)
    start.wait()
    try:
        rundir.prepare(dataclasses.replace(config, optim=optim))
        answers.put(decay)
    except UserError:
        answers.put(None)


def test_of_two_different_runs_started_at_once_one_wins(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(4), context.Queue()
    starts = [
        context.Process(target=_prepare, args=(str(tmp_path / "a"), decay, start, answers))
        for decay in (0.1, 0.1, 0.2, 0.2)
    ]
    for process in starts:
        process.start()
    winners = {answers.get(timeout=60) for _ in starts} - {None}
    for process in starts:
        process.join()
    stored = RunConfig.from_json((tmp_path / "a" / "config.json").read_text())
    assert winners == {stored.optim.weight_decay}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
