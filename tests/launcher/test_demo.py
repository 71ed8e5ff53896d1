from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from launcher import demo, rundir
from launcher.local import python_environment


def _line(run_dir, **values):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def _checkpoint(run_dir, step, *, complete=True):
    folder = run_dir / "checkpoints" / f"step_{step:010d}"
    folder.mkdir(parents=True)
    if complete:
        (folder / "MANIFEST.json").touch()


def test_the_crash_follows_the_first_complete_checkpoint_past_two_fifths(tmp_path):
    assert demo.crash_point(tmp_path) is None
    _line(tmp_path, kind="start", step=0, steps=100)
    assert demo.crash_point(tmp_path) is None
    _checkpoint(tmp_path, 40)
    _checkpoint(tmp_path, 50, complete=False)
    assert demo.crash_point(tmp_path) is None
    _checkpoint(tmp_path, 70)
    _checkpoint(tmp_path, 60)
    assert demo.crash_point(tmp_path) == 60


def test_a_run_is_finished_when_it_ended_at_its_last_step(tmp_path):
    assert not demo.finished(tmp_path)
    _line(tmp_path, kind="start", step=0, steps=100)
    _line(tmp_path, kind="stop", step=50)
    assert not demo.finished(tmp_path)
    (tmp_path / "metrics.jsonl").open("a").write('{"kind": "train", "st\n')
    _line(tmp_path, kind="start", step=50, steps=100)
    _line(tmp_path, kind="end", step=100)
    assert demo.finished(tmp_path)


def _foveate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        env=python_environment(rundir.CODE),
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_the_demonstration_crashes_resumes_and_exports(tmp_path):
    run_dir = tmp_path / "demo"
    arguments = [
        *("demo", "--run-dir", str(run_dir), "--data.source", "synthetic"),
        *("--data.train", "num_samples=96,num_classes=10,size=32"),
        *("--data.val", "num_samples=20,num_classes=10,size=32"),
        *("--train.batch-size", "8", "--train.epochs", "2", "--eval.batch-size", "10"),
        *("--checkpoint.every", "6", "--log.every", "4"),
    ]
    done = _foveate(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    crash = next(line for line in done.stdout.splitlines() if line.startswith("crash: "))
    starts = [line for line in demo.metrics(run_dir) if line["kind"] == "start"]
    assert [start["steps"] for start in starts] == [24, 24]
    assert f"step {starts[1]['step']};" in crash
    assert 9 < starts[1]["step"] < 24
    assert demo.finished(run_dir)
    assert (run_dir / "exports" / "timm" / "config.json").exists()
    for label in ("top-1 on the test images", "top-1 with EMA weights", "TensorBoard logs"):
        assert label in done.stdout

    again = _foveate(*arguments)
    assert again.returncode == 0
    assert "is complete: remove it to start anew" in again.stdout
    assert "crash: " not in again.stdout
    assert "top-1 on the test images" in again.stdout

    other = _foveate(*arguments, "--optim.lr", "1")
    assert other.returncode == 2
    assert other.stderr.startswith("error: ")
    assert other.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_demonstration_that_is_told_to_stop_does_so_instead_of_crashing(tmp_path):
    """Its checkpoint is the first one past 40 %, after which it would have crashed."""
    arguments = [
        *("demo", "--run-dir", str(tmp_path / "demo"), "--data.source", "synthetic"),
        *("--data.train", "num_samples=160,num_classes=10,size=16", "--model.img-size", "16"),
        *("--data.val", "num_samples=20,num_classes=10,size=16", "--train.epochs", "4"),
        *("--train.batch-size", "8", "--checkpoint.every", "1000", "--eval.every-epochs", "99"),
        *("--log.every", "1"),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "launcher", *arguments],
        env=python_environment(rundir.CODE),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said = iter(process.stdout)
        while not next(said).startswith("train step      40/80"):
            pass
        process.send_signal(signal.SIGTERM)
        rest, err = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "crash: " not in rest
    assert err.endswith("is saved: start the run again to go on\n")
    assert demo.crash_point(tmp_path / "demo") > 40


@pytest.mark.slow
def test_a_step_that_fails_ends_the_demonstration_with_its_exit_code(tmp_path):
    done = _foveate(
        *("demo", "--run-dir", str(tmp_path / "demo"), "--data.source", "folder"),
        *("--data.train", str(tmp_path / "nowhere"), "--data.val", str(tmp_path / "nowhere")),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "nowhere") in done.stderr
