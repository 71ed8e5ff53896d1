"""What the launcher asks of Slurm, asked of a real one."""

from __future__ import annotations

import re
import sys

import pytest

from launcher import slurm
from launcher.rundir import CODE
from launcher.slurm import Job
from trainer.config import UserError


@pytest.fixture
def here(cluster, monkeypatch, tmp_path):
    """Let this process be a user of the cluster, in a folder of its own."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(folder, text="exec sleep 600"):
    path = folder / "a b.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    return path


def test_a_job_is_submitted_found_and_cancelled(cluster, here):
    hostile = 'a  b | $(touch x); "'
    options = [f"--job-name={hostile}", "--time=1-02:03:00", "--nodes=2"]
    job_id = slurm.submit([*options, str(script(here)), hostile])
    cluster.wait(job_id, "RUNNING")
    job = slurm.job(job_id)
    assert (job.id, job.name, job.state) == (job_id, hostile, "RUNNING")
    assert job.nodes == ("node1", "node2")
    assert job.command == f"{here / 'a b.sh'} {hostile}"
    assert 93_000 < job.seconds_left <= 93_780
    assert job_id in [found.id for found in slurm.queue()]
    slurm.cancel(job_id)
    cluster.wait(job_id, "CANCELLED")
    assert job_id not in [found.id for found in slurm.queue()]
    assert not (here / "x").exists()


def test_a_job_that_queues_itself_again_runs_elsewhere(cluster, here):
    """Slurm ends the job's processes meanwhile, but not what they ask of it."""
    program = here / "job.py"
    program.write_text(
        "import os\n"
        "from launcher import slurm\n"
        "job_id, node = int(os.environ['SLURM_JOB_ID']), os.environ['SLURM_JOB_NODELIST']\n"
        "print(node, *slurm.job(job_id).excluded, flush=True)\n"
        "if 'SLURM_RESTART_COUNT' not in os.environ:\n"
        "    slurm.requeue(job_id, without=[node])\n"
    )
    path = script(here, f"PYTHONPATH='{CODE}' exec '{sys.executable}' job.py")
    options = ["--exclude=node4", "--requeue", "--open-mode=append", "--output=said"]
    job_id = slurm.submit([*options, str(path)])
    cluster.wait(job_id, "COMPLETED")
    first, second = re.findall(r"^(node\d)((?: node\d)*)$", (here / "said").read_text(), re.M)
    assert first[1].split() == ["node4"]
    assert set(second[1].split()) == {"node4", first[0]}
    assert second[0] not in ("node4", first[0])


def test_a_job_that_slurm_does_not_know_is_none(here):
    assert slurm.job(99_999_999) is None


def test_slurms_own_words_reach_the_user(cluster, here):
    with pytest.raises(UserError, match=r"sbatch failed: .*invalid partition specified: nowhere"):
        slurm.submit(["--partition=nowhere", str(script(here))])
    with pytest.raises(UserError, match=r"scontrol failed: .*Invalid job id"):
        slurm.requeue(99_999_999)


def test_a_machine_without_slurm_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        slurm.submit(["job.sh"])


def test_a_line_of_a_queued_job_is_read():
    line = "\x1f".join(
        ["7", "N/A", "n", "PENDING", "BeginTime", "", "x[1-2]", "UNLIMITED", "(null)"]
    )
    assert Job.parse(line) == Job(
        id=7, array_task=None, name="n", state="PENDING", reason="BeginTime", nodes=(),
        excluded=("x1", "x2"), seconds_left=None, command="(null)",
    )  # fmt: skip
