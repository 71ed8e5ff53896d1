"""What DeepSpeed's backends do beside dividing the state: a loss scale, and swapping to a disk."""

from __future__ import annotations

import pytest

from tests.trainer.runs import copy_checkpoint, train_named

STEPS, SAVED = 6, 3
RUN = (
    "--data.train", f"num_samples={24 * STEPS},num_classes=10,size=20",
    "--data.val", "num_samples=24,num_classes=10,size=20", "--train.epochs", "1",
    "--optim.warmup-epochs", "0.4", "--optim.eps", "1e-4", "--eval.every-epochs", "1",
    "--checkpoint.every", str(SAVED),
)  # fmt: skip
FP16 = ("--train.precision", "fp16", *RUN)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_fp16_runs_agree_and_go_on_under_other_backends(tmp_path):
    ways = {
        "ddp": (1, ["--backend.name", "ddp", *FP16]),
        "zero1": (2, ["--backend.name", "zero1", *FP16]),
        "zero3": (2, ["--backend.name", "zero3", *FP16]),
    }
    found = train_named(tmp_path / "whole", ways)
    alone = found["ddp"][0]
    assert alone[STEPS] < alone[1] - 0.1, "it learns"
    for losses, _ in found.values():
        assert losses == pytest.approx(alone, abs=0.01)
    moves = {"ddp": "zero3", "zero1": "ddp", "zero3": "zero1"}
    for before in moves:
        before_dir = tmp_path / "whole" / before
        copy_checkpoint(before_dir, tmp_path / "moved" / before, step=SAVED)
    moved = train_named(tmp_path / "moved", {b: ways[after] for b, after in moves.items()})
    for losses, _ in moved.values():
        assert losses == pytest.approx({s: alone[s] for s in range(SAVED + 1, STEPS + 1)}, abs=0.01)
