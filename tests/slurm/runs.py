"""Small runs for the tests of jobs: the shipped scripts, a pico model, generated images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.starts import Starts
from tests.slurm.cluster import ENDED, Cluster, wait_until
from tests.trainer.runs import lines, losses
from trainer import manifest

SCRIPTS = Path(__file__).parents[2] / "slurm"
EPOCHS, IMAGES, BATCH = 4, 480, 24
STEPS = EPOCHS * IMAGES // BATCH
TINY = (
    "--model.name", "transnext_pico", "--model.img-size", "16", "--model.num-classes", "10",
    "--model.drop-path", "0.2", "--data.source", "synthetic",
    "--data.train", f"num_samples={IMAGES},num_classes=10,size=20",
    "--data.val", "num_samples=48,num_classes=10,size=20",
    "--data.num-workers", "1", "--data.repeats", "1", "--eval.batch-size", "24",
    "--train.batch-size", str(BATCH), "--train.epochs", str(EPOCHS), "--train.precision", "fp32",
    "--optim.warmup-epochs", "1", "--eval.every-epochs", "4", "--backend.name", "fsdp",
    "--checkpoint.every", "5", "--checkpoint.keep-last", "9",
    "--log.every", "1", "--log.images", "0", "--cluster.no-preflight",
)  # fmt: skip
SMALL = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0")
"""What makes a script's nodes so small that one process runs on each, without a GPU."""


def submit(cluster: Cluster, folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> int:
    """Submit the script of TransNeXt-Base as it is shipped, cut to size from outside."""
    return cluster.submit(
        SCRIPTS / "pretrain_base.sh", *TINY, *arguments, options=[*SMALL, *options], folder=folder
    )


def run_of(folder: Path) -> Path:
    """Return the run folder of a job that was submitted from `folder`."""
    return folder / "runs" / "transnext_base"


def wait_for_checkpoint(cluster: Cluster, job: int, run: Path, *, beyond: int = 0) -> None:
    """Wait until a run that is not over has a checkpoint of a step beyond this one."""

    def is_there() -> bool:
        assert cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING"), cluster.diary(job)
        return any(map(_is_whole(beyond), manifest.checkpoints(run / "checkpoints")))

    wait_until(is_there, "a checkpoint", lambda: cluster.diary(job))


def _is_whole(beyond: int) -> Any:
    return lambda path: manifest.step_of(path) > beyond and (path / manifest.MANIFEST).exists()


def wait_for_start(cluster: Cluster, job: int, run: Path, count: int) -> None:
    """Wait until a run has been started so many times."""

    def is_there() -> bool:
        enough = len(Starts(run).read()[0]) >= count
        assert enough or cluster.state(job) not in ENDED, cluster.diary(job)
        return enough

    wait_until(is_there, f"start {count}", lambda: cluster.diary(job))


def output_of(folder: Path) -> str:
    """Return what the jobs submitted from `folder` have said."""
    return "".join(path.read_text() for path in sorted(folder.glob("*.out")))


def assert_same_run(run: Path, reference: dict[int, float]) -> None:
    """Assert that a run is whole: one folder, every image once an epoch, the reference's losses."""
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    shown = {line["epoch"]: line["shown"] for line in lines(run, "audit")}
    assert shown == dict.fromkeys(range(EPOCHS), IMAGES)
    assert losses(run) == pytest.approx(reference, abs=1e-5)
    assert lines(run, "end")[-1]["step"] == STEPS
