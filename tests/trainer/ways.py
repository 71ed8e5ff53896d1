"""Ways to spread one and the same run over processes, and what makes two runs the same.

AdamW's eps is 1e-4 here: at 1e-8 a gradient that is zero but for rounding moves its weight by the
whole learning rate, in a direction that rounding decides.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.runs import accuracies, lines, losses
from trainer import manifest
from trainer.checkpoint import read_state
from trainer.shardfile import ShardFile
from trainer.shares import DTYPES

Way = tuple[int, list[str]]
"""A number of processes, and arguments."""

FSDP = ["--backend.name", "fsdp"]
ALONE = "ddp on 1"
WAYS: dict[str, Way] = {
    ALONE: (1, ["--backend.name", "ddp"]),
    "ddp on 2": (2, ["--backend.name", "ddp"]),  # which is what DeepSpeed calls stage 0
    "ddp on 4": (4, ["--backend.name", "ddp"]),
    "fsdp on 1": (1, FSDP),
    "fsdp on 2": (2, FSDP),
    "fsdp on 3": (3, FSDP),
    "fsdp on 4": (4, FSDP),
    "hsdp on 2 × 2": (4, [*FSDP, "--backend.replicas", "2"]),
    "zero1 on 2": (2, ["--backend.name", "zero1"]),
    "zero2 on 2": (2, ["--backend.name", "zero2"]),
    "zero3 on 2": (2, ["--backend.name", "zero3"]),
    "zero3 on 2, offloaded": (2, ["--backend.name", "zero3", "--backend.offload", "all"]),
}
STEPS, SAVED, BATCH = 6, 3, 16
# Relative and absolute; moments are so small that the 1e-5 of all others would say nothing.
TOLERANCES = {"exp_avg": (1e-3, 1e-6), "exp_avg_sq": (1e-3, 1e-12)}
RUN = (
    "--data.train", f"num_samples={STEPS * BATCH},num_classes=10,size=20",
    "--data.val", f"num_samples={BATCH},num_classes=10,size=20",
    "--train.batch-size", str(BATCH), "--eval.batch-size", str(BATCH), "--train.epochs", "1",
    "--eval.every-epochs", "1", "--optim.warmup-epochs", "0.3", "--optim.eps", "1e-4",
)  # fmt: skip


def run_of(way: Way, *arguments: str) -> Way:
    """Return a run of 6 steps of 16 images in some way; it is evaluated once."""
    world_size, spread = way
    return world_size, [*RUN, *spread, *arguments]


def assert_same_run(found: Path, expected: Path) -> None:
    """Two run folders agree in loss and gradient of the first's every step, and in accuracy."""
    before, after = losses(expected), losses(found)
    assert after == pytest.approx({step: before[step] for step in after}, abs=1e-5, rel=0)
    # Clipping and AdamW would hide gradients that are too large by a factor.
    before, after = grad_norms(expected), grad_norms(found)
    assert after == pytest.approx({step: before[step] for step in after}, rel=1e-4)
    one_image = 100 / BATCH + 0.01  # may tip over
    assert accuracies(found) == pytest.approx(accuracies(expected), abs=one_image)


def assert_same_state(found: Path, expected: Path) -> None:
    """And in every number of the last checkpoint: weights, moments, buffers and averages."""
    assert_same_tensors(saved_state(found), saved_state(expected))


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two whole states agree."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        rtol, atol = TOLERANCES.get(name.split("/")[0], (0, 1e-5))
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=name)


def grad_norms(run_dir: Path) -> dict[int, float]:
    """Return the norm of every step's gradients before they were clipped."""
    return {line["step"]: line["grad_norm"] for line in lines(run_dir, "train")}


@lru_cache(maxsize=4)  # many are compared with the same one
def saved_state(run_dir: Path) -> dict[str, Tensor]:
    """Return the whole of every tensor in a run's last checkpoint."""
    folder = manifest.whole_checkpoint(run_dir)
    files = (ShardFile(folder / record.name) for record in manifest.read(folder).files)
    state = {
        piece.name: torch.empty(piece.shape, dtype=DTYPES[piece.dtype])
        for file in files
        for piece in file.pieces.values()
    }
    read_state(folder, state, whole=True)
    return state
