"""The documented script for torchrun, which is no driver of ours, on a real cluster."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.dist import free_port
from tests.slurm.runs import SMALL, STEPS, TINY, assert_same_run, run_of, wait_for_checkpoint
from tests.trainer.runs import lines, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


def documented(folder: Path) -> Path:
    """Write the script that the documentation shows, cut to the size of the tests."""
    (shown,) = re.findall(r"^```\n(#!.*?)^```$", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    for before, after in {
        ".venv/bin/": f"{Path(sys.executable).parent}/",
        "--data.train /data/imagenet/train \\\n    --data.val /data/imagenet/val": shlex.join(TINY),
        "--nproc-per-node=8": "--nproc-per-node=2",
        ":29500": f":{free_port()}",
    }.items():
        assert shown.count(before) > 0, before
        shown = shown.replace(before, after)
    script = folder / "job.sh"
    script.write_text(shown)
    return script


def test_workers_of_torchrun_save_at_the_warning_and_go_on(cluster, tmp_path):
    run = run_of(tmp_path)
    options = [*SMALL, "--nodes=2", "--output=out.txt"]
    job = cluster.submit(documented(tmp_path), options=options, folder=tmp_path)
    wait_for_checkpoint(cluster, job, run)
    cluster.run("scancel", "--signal=USR1", str(job))  # what --signal=USR1@300 does
    cluster.wait(job, "COMPLETED")
    assert cluster.show(job)["Restarts"] == "1"
    first, second = lines(run, "start")
    assert (first["step"], first["world_size"], second["world_size"]) == (0, 4, 4)
    assert second["step"] == lines(run, "stop")[0]["step"] > 0
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert_same_run(run, losses(run))
