"""A node that Slurm has lost runs on: what it started must leave the run to the next start."""

from __future__ import annotations

import pytest

from launcher.starts import Starts
from tests.slurm.cluster import wait_until
from tests.slurm.runs import (
    STEPS,
    assert_same_run,
    output_of,
    run_of,
    submit,
    wait_for_checkpoint,
)
from tests.trainer.runs import lines, losses
from trainer import manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_start_that_was_taken_for_dead_changes_nothing(cluster, tmp_path):
    run = run_of(tmp_path)
    job = submit(cluster, tmp_path, options=("--nodes=1",))
    wait_for_checkpoint(cluster, job, run)
    (first,), _ = Starts(run).read()
    (lost,) = first.nodes
    (worker,) = cluster.workers(lost)
    worker.suspend()
    cluster.kill_slurmd(lost)
    cluster.declare(lost, "down")
    cluster.wait(job, "COMPLETED")
    before = (run / "metrics.jsonl").read_text(), losses(run)

    worker.resume()
    wait_until(lambda: not worker.is_running(), "the lost one to end")
    assert ((run / "metrics.jsonl").read_text(), losses(run)) == before
    assert cluster.state(job) == "COMPLETED"
    assert output_of(tmp_path).count("complete") == 1
    starts, ends = Starts(run).read()
    assert [start.nodes == (lost,) for start in starts] == [True, False]
    assert set(ends) == {(job, 1)}
    written = [manifest.read(path) for path in manifest.checkpoints(run / "checkpoints")]
    assert {item.generation for item in written if item.step > starts[1].step} == {2}
    assert written[-1].step == STEPS
    assert [line["generation"] for line in lines(run, "start")] == [1, 2]
    assert_same_run(run, losses(run))
