"""Replay: a step of a run that ended is made again, alone, and what went bad is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import rundir
from launcher.local import launch
from tests.trainer.runs import losses, tiny_config

ROOT = Path(__file__).parents[2]


def replayed(run, step, *arguments):
    command = [sys.executable, "-m", "launcher", "replay", str(run), "--step", str(step)]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_step_of_two_processes_is_made_again_by_one_under_another_backend(tmp_path):
    run = rundir.prepare(
        tiny_config(tmp_path / "run", "--train.epochs", "2", "--eval.every-epochs", "2")
    )
    assert launch(run, num_processes=2) == 0
    before = sorted(path for path in run.rglob("*") if path.is_file())
    loss = losses(run)[8]
    done = replayed(run, 8, "--backend.name", "fsdp", "--train.accumulate", "2")
    assert done.returncode == 0, done.stderr
    assert "step 6 made again" in done.stdout
    assert "step 4 made again" not in done.stdout, "it starts from the checkpoint of step 5"
    [said] = [line for line in done.stdout.splitlines() if line.startswith("step 8: loss ")]
    assert float(said.split()[3]) == pytest.approx(loss, abs=2e-5)
    assert "all tensors are finite; those of the largest values:\n  " in done.stdout
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before

    write_record(run, loss)
    done = replayed(run, 8, "--optim.lr", "1e30")
    assert f"loss nan (recorded {loss:.6g})" in done.stdout
    assert "the first tensor that went bad is the output of " in done.stdout
    assert "values are not finite" in done.stdout

    done = replayed(run, 11)
    assert (done.returncode, done.stderr) == (2, "error: step 11 is not one of the run's 10\n")


def write_record(run, loss):
    """What two ranks' guards would have left."""
    for rank, part in enumerate((loss - 0.25, loss + 0.25)):
        record = {"why": "", "steps": [{"step": 8, "loss": part}]}
        (run / "logs" / f"steps_{rank:05d}.json").write_text(json.dumps(record))
