"""Jobs that are interrupted on a real cluster go on as if nothing had happened."""

from __future__ import annotations

import signal

import pytest

from launcher import slurm
from launcher.starts import Starts
from tests.slurm.cluster import wait_until
from tests.slurm.runs import (
    STEPS,
    assert_same_run,
    output_of,
    run_of,
    submit,
    wait_for_checkpoint,
    wait_for_start,
)
from tests.trainer.runs import lines, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """The folder of a job that nothing happened to, on two nodes with two processes each."""
    folder = tmp_path_factory.mktemp("a job")
    cluster.wait(submit(cluster, folder, options=("--nodes=2", "--ntasks-per-node=2")), "COMPLETED")
    return folder


@pytest.fixture(scope="module")
def reference(undisturbed):
    return losses(run_of(undisturbed))


def test_a_job_trains_to_the_end(undisturbed, reference):
    run = run_of(undisturbed)
    assert list(reference) == list(range(1, STEPS + 1))
    assert_same_run(run, reference)
    (start,), ends = Starts(run).read()
    assert (start.step, start.processes, start.nodes) == (0, 4, ("node1", "node2"))
    assert (ends[start.job, 0].code, ends[start.job, 0].step) == (0, STEPS)
    assert output_of(undisturbed).rstrip().endswith("complete")


def test_the_time_to_the_first_step_is_accounted_for(undisturbed):
    (startup,) = lines(run_of(undisturbed), "startup")
    assert {"driver", "folder", "srun", "python", "first_step", "total"} <= set(startup)
    assert startup["driver"] + startup["folder"] + startup["srun"] < startup["total"]


def test_a_complete_run_is_not_started_again(cluster, undisturbed, reference):
    before = (run_of(undisturbed) / "metrics.jsonl").read_text()
    cluster.wait(submit(cluster, undisturbed, options=("--nodes=1",)), "COMPLETED")
    assert output_of(undisturbed).endswith(f"{run_of(undisturbed)} is complete\n")
    assert (run_of(undisturbed) / "metrics.jsonl").read_text() == before


def test_a_time_limit_is_survived_on_another_number_of_nodes(cluster, reference, tmp_path):
    run = run_of(tmp_path)
    job = submit(cluster, tmp_path, options=("--nodes=2",))
    wait_for_checkpoint(cluster, job, run)
    # What --signal=B:USR1@300 does before the limit, which Slurm looks at but twice a minute.
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "NumTasks=1", "NumNodes=1")
    cluster.wait(job, "COMPLETED")
    (first, second), ends = Starts(run).read()
    assert (first.processes, len(second.nodes), second.processes) == (2, 1, 1)
    assert ends[job, 0].code == 75
    assert ends[job, 0].step == second.step == lines(run, "stop")[0]["step"]
    assert_same_run(run, reference)


def test_a_dead_node_is_survived(cluster, reference, tmp_path):
    run = run_of(tmp_path)
    job = submit(cluster, tmp_path, options=("--nodes=2",))
    wait_for_checkpoint(cluster, job, run)
    dead = Starts(run).read()[0][0].nodes[1]
    cluster.cut_power(dead)
    cluster.declare(dead, "down")
    cluster.wait(job, "COMPLETED")
    (_, second), _ = Starts(run).read()
    assert dead not in second.nodes
    assert second.step > 0
    assert_same_run(run, reference)
    cluster.start(dead)
    cluster.declare(dead, "resume")


def test_a_rank_that_is_killed_is_survived(cluster, reference, tmp_path):
    run = run_of(tmp_path)
    job = submit(cluster, tmp_path, options=("--nodes=2",))
    wait_for_checkpoint(cluster, job, run)
    (first,), _ = Starts(run).read()
    cluster.workers(first.nodes[1])[0].send_signal(signal.SIGKILL)
    cluster.wait(job, "COMPLETED")
    (_, second), ends = Starts(run).read()
    assert second.step > 0
    assert ends[job, 0].code == 1
    assert_same_run(run, reference)


@pytest.mark.parametrize("partition", ["low", "graceful"])
def test_a_preemption_is_survived(cluster, reference, tmp_path, partition):
    run = run_of(tmp_path)
    options = (f"--partition={partition}", "--nodes=2", "--exclusive")
    job = submit(cluster, tmp_path, options=options)
    wait_for_checkpoint(cluster, job, run)
    other = tmp_path / "other.sh"
    other.write_text("#!/bin/sh\nexit 0\n")
    high = cluster.submit(
        other, options=["--partition=high", "--nodes=4", "--exclusive"], folder=tmp_path
    )
    cluster.wait(high, "COMPLETED")
    cluster.wait(job, "COMPLETED")
    (_, second), _ = Starts(run).read()
    assert second.step == lines(run, "stop")[0]["step"], "it was saved before it had to go"
    assert_same_run(run, reference)


def test_a_node_that_fails_its_checks_costs_no_training(cluster, reference, tmp_path, monkeypatch):
    run = run_of(tmp_path)
    job = submit(cluster, tmp_path, "--cluster.preflight", options=("--nodes=2",))
    wait_for_start(cluster, job, run, 1)
    bad = Starts(run).read()[0][0].nodes[1]
    checks = []
    wait_until(lambda: checks.extend(cluster.processes(bad, "trainer.preflight")) or checks, "them")
    for process in checks:
        process.kill()
    cluster.wait(job, "COMPLETED")
    (first, second), ends = Starts(run).read()
    assert (ends[job, 0].code, first.step, second.step) == (76, 0, 0)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    assert slurm.job(job).excluded == (bad,)
    assert bad not in second.nodes
    assert f"bad nodes: --exclude={bad}\n" in output_of(tmp_path)
    assert output_of(tmp_path).count("2 nodes are fit\n") == 1
    assert_same_run(run, reference)


def test_a_rank_that_hangs_costs_its_node_the_job(cluster, reference, tmp_path, monkeypatch):
    run = run_of(tmp_path)
    job = submit(cluster, tmp_path, "--guard.hang-seconds", "25", options=("--nodes=2",))
    wait_for_checkpoint(cluster, job, run)
    (first,), _ = Starts(run).read()
    bad = first.nodes[1]
    cluster.workers(bad)[0].suspend()
    wait_for_start(cluster, job, run, 2)
    (_, second), ends = Starts(run).read()
    assert ends[job, 0].code == 76
    assert bad in ends[job, 0].why
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    assert slurm.job(job).excluded == (bad,)
    assert bad not in second.nodes
    cluster.wait(job, "COMPLETED")
    assert_same_run(run, reference)
