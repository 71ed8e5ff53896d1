"""What the launcher asks of Slurm, asked of a real one."""

from __future__ import annotations

import pytest

from launcher import slurm
from launcher.slurm import Job
from tests.slurm.cluster import wait_until
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


def test_a_requeued_job_runs_elsewhere(cluster, here):
    options = ["--exclude=node4", "--requeue", "--open-mode=append", "--output=said"]
    job_id = slurm.submit([*options, str(script(here, "hostname; exec sleep 600"))])
    cluster.wait(job_id, "RUNNING")
    wait_until((here / "said").exists, "the first start")
    wait_until((here / "said").read_text, "the first start to speak")
    (first,) = slurm.job(job_id).nodes
    slurm.requeue(job_id, without=[first])
    assert set(slurm.job(job_id).excluded) == {"node4", first}
    cluster.wait(job_id, "RUNNING")
    assert slurm.job(job_id).nodes[0] not in ("node4", first)
    wait_until(
        lambda: len((here / "said").read_text().split("\n")) > 2, "the second start to speak"
    )
    slurm.cancel(job_id)


def test_what_a_job_says_of_requeueing_is_known(cluster, here):
    for option, may in (("--requeue", True), ("--no-requeue", False)):
        job_id = slurm.submit([option, "--hold", str(script(here))])
        assert slurm.may_requeue(job_id) is may
        slurm.cancel(job_id)


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
