"""What DeepSpeed's backends do beside dividing the state: a loss scale, and swapping to a disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.dist import run_distributed
from tests.trainer.runs import copy_checkpoint, train_named
from tests.trainer.test_backends import config, make, step_around_a_bad_one
from trainer import zero_config
from trainer.config import UserError

STEPS, SAVED = 6, 3
RUN = (
    "--data.train", f"num_samples={24 * STEPS},num_classes=400,size=20",
    "--data.val", "num_samples=24,num_classes=400,size=20", "--train.epochs", "1",
    # A group of weights is swapped from 1 MiB a process on.
    "--model.num-classes", "400",
    "--optim.warmup-epochs", "0.4", "--optim.eps", "1e-4", "--eval.every-epochs", "1",
    "--checkpoint.every", str(SAVED),
)  # fmt: skip
FP16 = ("--train.precision", "fp16", *RUN)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def _reads_disks():
    """Let DeepSpeed have what it swaps with, which takes minutes to compile the first time."""
    compiled = run_distributed(_compile, 1, timeout=1500)
    if not compiled[0]:
        pytest.skip("DeepSpeed needs libaio to swap to a disk, and there is none")


def _compile(rank: int, world_size: int) -> bool:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    return bool(builder.is_compatible(verbose=False) and builder.load(verbose=False))


def go_on(
    folder: Path, ways: dict[str, tuple[int, list[str]]], moves: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train `ways`, then go on from the middle of some in another way; return the losses."""
    whole, moved = folder / "whole", folder / "moved"
    found = train_named(whole, ways)
    for before in moves:
        copy_checkpoint(whole / before, moved / before, step=SAVED)
    after = train_named(moved, {before: ways[way] for before, way in moves.items()})
    return {way: run[0] for way, run in found.items()}, {way: run[0] for way, run in after.items()}


def assert_same_losses(found, moved, alone, *, near):
    """Runs lose what `alone` does, and those that moved, from the step after their move on."""
    for losses in found.values():
        assert losses == pytest.approx(alone, abs=near)
    for losses in moved.values():
        assert losses == pytest.approx({s: alone[s] for s in range(SAVED + 1, STEPS + 1)}, abs=near)


def test_fp16_runs_agree_and_go_on_under_other_backends(tmp_path):
    ways = {
        "ddp": (1, ["--backend.name", "ddp", *FP16]),
        "zero1": (2, ["--backend.name", "zero1", *FP16]),
        "zero3": (2, ["--backend.name", "zero3", *FP16]),
    }
    found, moved = go_on(tmp_path, ways, {"ddp": "zero3", "zero1": "ddp", "zero3": "zero1"})
    assert_same_losses(found, moved, found["ddp"], near=2e-3)


@pytest.mark.usefixtures("_reads_disks")
def test_runs_whose_state_is_on_a_disk_are_the_same_runs(tmp_path):
    disk = tmp_path / "disk"
    on_disk = ["--backend.name", "zero3", "--backend.offload-dir", str(disk), *RUN]
    ways = {
        "zero3": (2, ["--backend.name", "zero3", *RUN]),
        "on disk": (2, [*on_disk, "--backend.offload", "optimizer"]),
        "all but on disk": (1, [*on_disk, "--backend.offload", "all"]),
    }
    moves = {"zero3": "on disk", "on disk": "all but on disk", "all but on disk": "zero3"}
    found, moved = go_on(tmp_path, ways, moves)
    swapped = [path.name for path in disk.rglob("exp_avg_sq-*.swp")]
    assert len(swapped) == 2 * (2 + 1), "of each process in its run's folder"
    assert_same_losses(found, moved, found["zero3"], near=1e-5)


@pytest.mark.usefixtures("_reads_disks")
def test_a_state_on_a_disk_is_left_alone_and_taken_over_as_any_other(tmp_path):
    for in_memory, on_disk in run_distributed(_step_with_and_without, 2, str(tmp_path)):
        assert on_disk["skipped"] == [0.0, 1.0, 0.0]
        assert on_disk["changed"] == []
        assert on_disk["restored"]
        assert on_disk["norms"] == pytest.approx(in_memory["norms"], rel=1e-5, abs=1e-9)
    assert len([*tmp_path.rglob("rank0/exp_avg-*.swp")]) > 2, "in several pieces"


def _step_with_and_without(rank: int, world_size: int, folder: str) -> list[dict[str, object]]:
    # Large enough for single gradients above 1 MiB.
    zero3 = ["--backend.name", "zero3", "--model.name", "transnext_micro"]
    on_disk = ["--backend.offload", "optimizer", "--backend.offload-dir", folder]
    with mock.patch.object(zero_config, "BUCKET", 1_000_000):
        return [step_around_a_bad_one(config(*zero3, *more)) for more in ([], on_disk)]


@pytest.mark.usefixtures("_reads_disks")
def test_a_disk_that_cannot_be_used_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    [[said, without]] = run_distributed(_refused, 1, str(tmp_path / "file"))
    assert "cannot be written past the page cache (Not a directory): give a folder" in said
    assert "install libaio-dev" in without


def _refused(rank: int, world_size: int, folder: str) -> list[str]:
    arguments = ["--backend.name", "zero3", "--backend.offload", "all"]
    run = config(*arguments, "--backend.offload-dir", folder)
    with pytest.raises(UserError) as disk:
        make(run)
    # Without a compiler that finds it, the library is as good as missing.
    with mock.patch.dict(os.environ, {"CC": "false"}), pytest.raises(UserError) as library:
        make(run)
    return [str(disk.value), str(library.value)]
