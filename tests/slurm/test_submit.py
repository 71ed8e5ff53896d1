"""`foveate submit` and `foveate runs` on a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import rundir
from launcher.demo import metrics
from launcher.local import python_environment
from tests.slurm.cluster import wait_until

HOSTILE = '$(touch x); "'
TINY = [
    *("--data.source", "synthetic", "--data.train", "num_samples=64,num_classes=10,size=32"),
    *("--data.val", "num_samples=16,num_classes=10,size=32", "--eval.batch-size", "16"),
    *("--train.batch-size", "8", "--train.epochs", "1", "--log.every", "1"),
    "--cluster.no-preflight",
]
HERE = ["demo", "--nodes", "1", "--gpus-per-node", "0", "--ntasks-per-node", "1"]

pytestmark = pytest.mark.slow


class User:
    """Somebody who types commands in a folder of the cluster."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder

    def foveate(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run the front door, which has to return `code`; return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=self.folder,
            env={**python_environment(rundir.CODE), **self.cluster.environment, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def submit(self, *arguments: str, **environment: str) -> list[int]:
        """Submit and return the ids of the jobs, in the order in which they will run."""
        first = self.foveate("submit", *arguments, **environment).partition(":")[0]
        return [int(word) for word in first.replace(",", "").split() if word.isdecimal()]

    def runs(self, folder: str | Path = ".") -> dict[str, dict[str, Any]]:
        """Return what `foveate runs` knows, by the name of the run's folder."""
        found = json.loads(self.foveate("runs", str(folder), "--json"))
        return {Path(run["folder"]).name: run for run in found}


@pytest.fixture
def user(cluster, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return User(cluster, folder)


def starts(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in metrics(run_dir) if event["kind"] == "start"]


def test_a_submitted_run_trains_to_its_end(cluster, tmp_path):
    """From a hostile folder, into one with a space; a second job then has nothing left to do."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    user, run = User(cluster, folder), tmp_path / "a b" / "run"
    nodes = ["demo", "--nodes", "2", "--gpus-per-node", "0", "--ntasks-per-node", "2"]
    hostile = ["--checkpoint.local-dir", f"{tmp_path}/local {HOSTILE}\n#SBATCH --nodes=3\n"]
    chain = ["--chain", "2", "--time", "30"]
    job, idle = user.submit(*nodes, *TINY, *hostile, "--run-dir", str(run), *chain)
    cluster.wait(job, "COMPLETED")
    cluster.wait(idle, "COMPLETED")
    found = user.runs(run)["run"]
    assert (found["state"], found["step"], found["steps"]) == ("complete", 8, 8)
    assert found["checkpoint_step"] == 8
    assert metrics(run)[-1]["kind"] == "end"
    assert [start["world_size"] for start in starts(run)] == [4]
    assert "end   step" in (run / "logs" / f"slurm-{job}.out").read_text()
    assert not list(tmp_path.rglob("x"))
    assert "is complete" in user.foveate("submit", *nodes, *TINY, "--run-dir", str(run), code=2)


def test_the_next_job_of_a_chain_goes_on_where_the_last_was_stopped(cluster, user, tmp_path):
    longer = ["--train.epochs", "1000", "--eval.every-epochs", "1000"]
    first, second = user.submit(*HERE, *TINY, *longer, "--chain", "2")
    run = user.folder / "runs" / "demo"
    assert user.runs()["demo"]["job"] == first
    assert str(first) in user.foveate("submit", *HERE, *TINY, *longer, code=2)
    wait_until(lambda: user.runs()["demo"]["step"], "the first step", lambda: cluster.diary(first))
    cluster.run("scancel", "--batch", "--signal=USR1", str(first))
    cluster.wait(first, "FAILED")
    assert "may not be queued again" in (run / "logs" / f"slurm-{first}.out").read_text()
    cluster.wait(second, "RUNNING")
    wait_until(lambda: len(starts(run)) == 2, "the second start", lambda: cluster.diary(second))
    stopped = next(event for event in metrics(run) if event["kind"] == "stop")
    assert starts(run)[1]["step"] == stopped["step"] > 0
    assert user.runs()["demo"]["state"] == "running"
    (run / "stop").touch()
    cluster.wait(second, "FAILED")
    assert user.runs()["demo"]["state"] == "stopped"
    # By hand, once it may.
    (run / "stop").unlink()
    again = cluster.submit(run / "job.sbatch", options=["--nodes=2"], folder=tmp_path)
    wait_until(lambda: len(starts(run)) == 3, "the third start", lambda: cluster.diary(again))
    assert starts(run)[2]["world_size"] == 2
    cluster.run("scancel", str(again))
    cluster.wait(again, "CANCELLED")


def test_the_runs_of_a_sweep_are_one_array(cluster, user):
    table = user.foveate("submit", *HERE, *TINY, "--sweep", "optim.lr=1e-3,2e-3").splitlines()
    assert table[0].split() == ["job", "settings", "run", "folder"]
    array = int(table[1].partition("_")[0])
    assert table[2].split()[:3] == [f"{array}_1", "optim.lr", "2e-3"]
    known = user.runs()
    assert sorted(known) == ["demo-0", "demo-1"]
    assert all(run["job"] is not None for run in known.values())
    wait_until(
        lambda: {run["state"] for run in user.runs().values()} == {"complete"},
        "both runs to be complete",
        lambda: cluster.diary(array),
    )
    rates = [
        json.loads((user.folder / "runs" / name / "config.json").read_text())["optim"]["lr"]
        for name in ("demo-0", "demo-1")
    ]
    assert rates == [1e-3, 2e-3]
    assert list((user.folder / "runs" / "demo-1" / "logs").glob("slurm-*_1.out"))


def test_what_slurm_refuses_leaves_nothing_behind(user):
    refused = {"node configuration": ["--nodes", "9"], "partition": ["--partition", "nowhere"]}
    for word, options in refused.items():
        said = user.foveate("submit", *HERE, *TINY, *options, code=2)
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert word in said
    assert list(user.folder.iterdir()) == []


def test_a_waiting_job_is_seen_and_what_is_typed_wins_over_the_environment(cluster, user):
    held = [*HERE, *TINY, "--sbatch", "hold"]
    (first,) = user.submit(*held, SBATCH_PARTITION="low")
    (second,) = user.submit(
        *held, "--partition", "main", "--run-dir", "other", SBATCH_PARTITION="low"
    )
    assert [cluster.show(job)["Partition"] for job in (first, second)] == ["low", "main"]
    found = user.runs()["demo"]
    assert (found["state"], found["why"], found["job"]) == ("queued", "JobHeldUser", first)
    said = user.foveate("submit", *held, code=2)
    assert f"is job {first} already, PENDING" in said
    cluster.run("scancel", str(first), str(second))
    (user.folder / "runs" / "demo" / "stop").touch()
    assert "keeps this run stopped" in user.foveate("submit", *held, code=2)
