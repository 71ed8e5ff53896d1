"""When a job tries again and when it gives up, and what the driver tells srun."""

from __future__ import annotations

import json
import os

import pytest

from launcher import container
from launcher.job import Allocation, worker_command
from launcher.starts import Starts
from trainer import manifest
from trainer.config import UserError, override
from trainer.recipes import recipe


@pytest.fixture
def run(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def begin(run, restart, job=7):
    return Starts(run).begin(job=job, restart=restart, nodes=("a", "b"), processes=2)


def save(run, step):
    folder = manifest.step_folder(run / "checkpoints", step)
    folder.mkdir(parents=True)
    (folder / manifest.MANIFEST).write_text("")


def fails_for_good(run, start, code=1):
    return Starts(run).has_failed_enough(Starts(run).end(start, code=code, why="why"))


def test_the_second_failure_in_a_row_without_a_checkpoint_is_the_last(run):
    assert not fails_for_good(run, begin(run, 0))
    assert fails_for_good(run, begin(run, 1))


def test_a_checkpoint_buys_another_try(run):
    for restart in range(5):
        start = begin(run, restart)
        save(run, restart + 1)
        assert not fails_for_good(run, start)
    assert not fails_for_good(run, begin(run, 5))
    assert fails_for_good(run, begin(run, 6))


def test_going_back_is_no_advance(run):
    save(run, 5)
    assert not fails_for_good(run, begin(run, 0))
    manifest.remove_from(run / "checkpoints", 5)
    assert fails_for_good(run, begin(run, 1))


def test_starts_that_find_a_bad_node_may_be_more(run):
    for restart in range(7):
        end = Starts(run).end(begin(run, restart), code=76, why="why", without=[f"n{restart}"])
        assert not Starts(run).has_failed_enough(end)
    assert not fails_for_good(run, begin(run, 7))
    assert fails_for_good(run, begin(run, 8))


def test_what_is_ended_from_outside_counts_apart(run):
    begin(run, 0)
    assert not fails_for_good(run, begin(run, 1))
    begin(run, 2)
    begin(run, 3)
    with pytest.raises(UserError, match="3 starts of job 7 in a row were ended from outside"):
        begin(run, 4)


def test_a_job_that_is_submitted_anew_may_try_anew(run):
    for restart in range(3):
        begin(run, restart)
    assert not fails_for_good(run, begin(run, 0, job=8))


def test_a_checkpoint_without_a_manifest_is_none(run):
    manifest.step_folder(run / "checkpoints", 3).mkdir(parents=True)
    assert begin(run, 0).step == 0


def test_a_line_that_a_crash_cut_short_is_passed_over(run):
    first = begin(run, 0)
    with (run / "logs" / "starts.jsonl").open("a") as file:
        file.write('{"job": 7, "rest\n')
    second = begin(run, 1)
    assert Starts(run).read()[0] == [first, second]
    assert Starts(run).is_newest(second)
    assert not Starts(run).is_newest(first)


def test_a_run_is_complete_until_its_last_checkpoint_is_removed(run):
    start = begin(run, 0)
    assert not Starts(run).is_complete()
    save(run, 9)
    Starts(run).end(start, code=0, why="complete")
    assert Starts(run).is_complete()
    manifest.remove_from(run / "checkpoints", 9)
    assert not Starts(run).is_complete()


def test_the_tasks_follow_from_the_nodes_that_a_job_has_now():
    slurms = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS": "16"}
    found = Allocation.from_environment(
        {**slurms, "SLURM_NTASKS_PER_NODE": "8", "SLURM_RESTART_COUNT": "2"}
    )
    assert found == Allocation(job=7, restart=2, nodes=("n1", "n2", "n3"), tasks=24)
    assert Allocation.from_environment(slurms).tasks == 16


def test_outside_of_a_job_the_driver_says_so():
    with pytest.raises(UserError, match=r"this is no Slurm job .*: submit a script of slurm/"):
        Allocation.from_environment({})


def test_containers_see_the_folders_that_a_run_needs(run):
    config = override(
        recipe("transnext_base"),
        ["--data.train", "s3://bucket/train", "--data.val", "val", "--data.cache-dir", "/scratch"],
    )
    val = os.path.abspath("val")
    worker = ["python3", "-m", "trainer", "--config", str(run / "config.json")]
    assert worker_command(config, run, image="torch.sif") == [
        *("apptainer", "exec", "--nv"),
        *(f"--bind={run}", f"--bind={val}", "--bind=/scratch"),
        *("torch.sif", *worker),
    ]
    assert worker_command(config, run, image="nvcr.io#nvidia/pytorch") == [
        "--container-image=nvcr.io#nvidia/pytorch",
        f"--container-mounts={run}:{run},{val}:{val},/scratch:/scratch",
        *worker,
    ]
    assert worker_command(config, run, image="")[1:] == worker[1:]


def test_containers_see_what_lies_elsewhere(run, tmp_path):
    shards, index = tmp_path / "shards", tmp_path / "index"
    index.mkdir()
    (index / "manifest.json").write_text(json.dumps({"base": str(shards)}))
    config = override(
        recipe("transnext_base"),
        [
            *("--data.train", str(index), "--data.val", str(index)),
            *("--backend.name", "zero3", "--backend.offload", "all"),
            *("--backend.offload-dir", "/nvme", "--distill.teacher", "timm:resnet50"),
            *("--distill.weights", "/teacher/w.safetensors"),
        ],
    )
    wanted = [str(run), str(index), str(shards), "/nvme", "/teacher/w.safetensors"]
    assert container.folders(config, run) == wanted
