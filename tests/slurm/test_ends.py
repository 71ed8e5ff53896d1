"""Jobs that end for good: what users ask for, and what another start would not mend."""

from __future__ import annotations

import pytest

from launcher.starts import Starts
from tests.slurm.runs import output_of, run_of, submit, wait_for_checkpoint, wait_for_start
from tests.trainer.runs import lines
from trainer import manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_cancelled_job_is_saved_and_not_queued_again(cluster, tmp_path):
    run = run_of(tmp_path)
    job = submit(cluster, tmp_path, options=("--nodes=2",))
    wait_for_checkpoint(cluster, job, run)
    cluster.run("scancel", str(job))
    cluster.wait(job, "CANCELLED")
    (stop,) = lines(run, "stop")
    newest = manifest.checkpoints(run / "checkpoints")[-1]
    assert manifest.step_of(newest) == stop["step"]
    assert manifest.damage(newest) == []
    assert len(Starts(run).read()[0]) == 1


def test_a_stop_file_ends_a_job_and_keeps_the_next_from_starting(cluster, tmp_path):
    run = run_of(tmp_path)
    longer = ("--train.epochs", "100", "--eval.every-epochs", "100")
    job = submit(cluster, tmp_path, *longer, options=("--nodes=1",))
    wait_for_checkpoint(cluster, job, run)
    (run / "stop").touch()
    cluster.wait(job, "FAILED")
    (start,), ends = Starts(run).read()
    assert ends[start.job, 0].code == 78
    assert ends[start.job, 0].step == lines(run, "stop")[0]["step"]

    cluster.wait(submit(cluster, tmp_path, *longer, options=("--nodes=1",)), "FAILED")
    assert f"error: {run / 'stop'} keeps this run stopped" in output_of(tmp_path)
    assert len(Starts(run).read()[0]) == 1


def test_a_job_that_gets_nowhere_is_tried_twice(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--run-dir", "broken", options=("--nodes=1",))
    frozen = tmp_path / "broken" / "code" / "trainer" / "loop.py"
    wait_for_start(cluster, job, tmp_path / "broken", 1)
    with frozen.open("a") as file:
        file.write("\ndef Trainer(config, process):\n    raise RuntimeError('on purpose')\n")
    cluster.wait(job, "FAILED")
    starts, ends = Starts(tmp_path / "broken").read()
    assert [(start.job, start.restart) for start in starts] == [(job, 0), (job, 1)]
    assert all("on purpose" in end.why for end in ends.values())
    assert "saved nothing beyond step 0" in output_of(tmp_path)


def test_a_mistake_is_not_tried_again(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--optim.lrr", "1", options=("--nodes=1",))
    cluster.wait(job, "FAILED")
    assert output_of(tmp_path) == ("error: unknown option --optim.lrr; did you mean --optim.lr?\n")
    missing = submit(
        cluster, tmp_path, "--data.source", "folder", "--data.train", "none",
        options=("--nodes=1", "--output=data"),
    )  # fmt: skip
    cluster.wait(missing, "FAILED")
    said = (tmp_path / "data").read_text()
    assert "error: " in said
    assert str(tmp_path / "none") in said
    assert "queued again" not in said


def test_a_hostile_name_is_a_name(cluster, tmp_path):
    hostile = '$(touch x); "`touch y`'
    job = submit(
        cluster, tmp_path, "--run-dir", f"runs/{hostile}", "--train.epochs", "1",
        options=("--nodes=1", f"--job-name={hostile}", "--output=said"),
    )  # fmt: skip
    cluster.wait(job, "COMPLETED")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "said"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [hostile]
