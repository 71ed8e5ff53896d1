"""The printed commands start the workers of a prepared run in a Slurm step."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from launcher import demo, rundir
from launcher.local import python_environment
from launcher.process import Failure


@pytest.mark.slow
def test_srun_workers_train_a_prepared_run(tmp_path):
    run_dir = tmp_path / "a run"
    prepared = subprocess.run(
        [
            *(sys.executable, "-m", "launcher", "pretrain", "demo", "--prepare"),
            *("--run-dir", str(run_dir), "--data.source", "synthetic"),
            *("--data.train", "num_samples=32,num_classes=10,size=32"),
            *("--data.val", "num_samples=16,num_classes=10,size=32"),
            *("--train.batch-size", "8", "--train.epochs", "1", "--eval.batch-size", "8"),
        ],
        env=python_environment(rundir.CODE),
        capture_output=True,
        text=True,
        check=True,
    )
    export, srun = map(shlex.split, prepared.stdout.splitlines())
    assert export[0] == "export"
    assert srun[:2] == ["srun", "python"]
    step = {
        **dict(item.split("=", 1) for item in export[1:]),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "OMP_NUM_THREADS": "1",
    }
    Failure(rank=1, code=1, message="of an earlier start").leave(run_dir)
    workers = [
        subprocess.Popen(
            [sys.executable, *srun[2:]],
            env={**os.environ, **step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            cwd=tmp_path,
        )
        for rank in ("0", "1")
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    assert demo.finished(run_dir)
    assert Failure.read(run_dir) is None
    assert demo.metrics(run_dir)[0]["world_size"] == 2
