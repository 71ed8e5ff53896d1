"""Runs whose operators have their faster forms, in Triton's interpreter, learn as any other.

    TRITON_INTERPRET=1 python -m tests.trainer.test_kernels

trains one for fifty steps in both forms, which takes minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from models.kernels.choice import force
from tests.dist import run_distributed
from tests.trainer.runs import lines, losses, tiny_config, train
from tests.trainer.ways import ALONE, WAYS, Way

RUN = (
    "--model.img-size", "8", "--data.val", "num_samples=1,num_classes=10,size=20",
    "--data.mixup", "0", "--data.cutmix", "0", "--eval.batch-size", "1", "--train.epochs", "1",
    "--eval.every-epochs", "1", "--optim.warmup-epochs", "0.3", "--optim.eps", "1e-4",
)  # fmt: skip
RECOMPUTED = ["--memory.checkpointing", "full"]


def train_in_form(rank: int, world_size: int, form: str, config: str) -> bool:
    with force(form):
        return train(rank, world_size, config)


def run(folder: Path, model: str, steps: int, form: str, way: Way) -> Path:
    """Train a model for so many steps of two images; return the run's folder."""
    world_size, arguments = way
    images = f"num_samples={2 * steps},num_classes=10,size=20"
    arguments = ["--model.name", model, "--data.train", images, *RUN, *arguments]
    config = tiny_config(folder / form, "--train.batch-size", "2", *arguments)
    run_distributed(train_in_form, world_size, form, config.to_json(), timeout=1200)
    assert len(losses(folder / form)) == steps
    return folder / form


def assert_same_losses(folder: Path, steps: int) -> None:
    """A run of TransNeXt loses with the kernels what it loses without."""
    expected = losses(run(folder, "transnext_pico", steps, "eager", WAYS[ALONE]))
    found = losses(run(folder, "transnext_pico", steps, "triton", WAYS[ALONE]))
    assert found == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "way", "steps"),
    [("transnext_pico", "fsdp on 2", 2), ("transxnet_pico", "zero3 on 2", 1)],
)
def test_recomputed_and_on_shares_of_the_weights_steps_are_the_same(tmp_path, model, way, steps):
    """Every operator runs twice a step, on weights that are gathered each time."""
    world_size, arguments = WAYS[way]
    plain = run(tmp_path, model, steps, "eager", WAYS[ALONE])
    fused = run(tmp_path, model, steps, "triton", (world_size, [*arguments, *RECOMPUTED]))
    assert losses(fused) == pytest.approx(losses(plain), abs=1e-5, rel=0)
    # Of the first step: BatchNorm over two images of a pixel each makes much of rounding.
    first, expected = (lines(folder, "train")[0]["grad_norm"] for folder in (fused, plain))
    assert first == pytest.approx(expected, rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        assert_same_losses(Path(name), steps=50)
