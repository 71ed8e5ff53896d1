"""Recipes beyond the published: the same losses under every backend and world size."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.dist import run_distributed
from tests.trainer.runs import copy_checkpoint, lines, losses, tiny_config, train, train_named

STEPS = 3
SHORT = ["--train.epochs", "1", "--optim.warmup-epochs", "0.4", "--eval.every-epochs", "1"]
SHORT += ["--data.train", f"num_samples={24 * STEPS},num_classes=10,size=20"]
SHORT += ["--checkpoint.every", "2"]
EVERYTHING = [
    *("--optim.layer-decay", "0.8", "--optim.weight-decay-end", "0.2"),
    *("--train.drop-path-ramp", "cosine", "--train.ema-warmup"),
]
RECIPES = {
    "lamb": ["--optim.name", "lamb", "--optim.lr", "2e-2", "--train.microbatch", "auto"],
    "muon": ["--optim.name", "muon", *EVERYTHING, "--distill.teacher", "timm:test_resnet"],
}
WAYS = {
    "ddp on 1": (1, ["--backend.name", "ddp"]),
    "ddp on 2": (2, ["--backend.name", "ddp"]),
    "fsdp on 2": (2, ["--backend.name", "fsdp"]),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of every recipe in every way are kept."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, tuple[dict[int, float], list[float]]]:
    """What every run came to."""
    teacher = folder / "teacher.safetensors"
    torch.manual_seed(0)  # from some random teachers nothing can be learnt in three steps
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), teacher)
    RECIPES["muon"] += ["--distill.weights", str(teacher)]
    named = {
        f"{name}, {way}": (world_size, [*SHORT, *arguments, *backend])
        for name, arguments in RECIPES.items()
        for way, (world_size, backend) in WAYS.items()
    }
    return train_named(folder, named)


@pytest.mark.parametrize("name", RECIPES)
def test_backends_and_world_sizes_agree(
    name: str, found: dict[str, tuple[dict[int, float], list[float]]]
) -> None:
    loss, accuracy = found[f"{name}, ddp on 1"]
    assert len(loss) == STEPS
    assert loss[STEPS] < loss[1] - 0.1, "it learns"
    for way in WAYS:
        other = found[f"{name}, {way}"]
        assert other[0] == pytest.approx(loss, abs=1e-5), way
        assert other[1] == pytest.approx(accuracy, abs=2.01), way  # one image of 50 may tip over


@pytest.mark.usefixtures("found")
def test_the_start_tells_how_steps_are_split(folder: Path) -> None:
    for way in WAYS:  # a CPU takes every step at once
        assert [line["accumulate"] for line in lines(folder / f"lamb, {way}", "start")] == [1]


@pytest.mark.usefixtures("found")
def test_the_teacher_s_part_of_the_loss_is_logged(folder: Path) -> None:
    parts = {
        way: [line["distill_loss"] for line in lines(folder / f"muon, {way}", "train")]
        for way in WAYS
    }
    for found in parts.values():
        assert found == pytest.approx(parts["ddp on 1"], abs=1e-5)


@pytest.mark.usefixtures("found")
def test_muon_goes_on_divided_otherwise(folder: Path, tmp_path: Path) -> None:
    before = folder / "muon, ddp on 2"
    copy_checkpoint(before, tmp_path, step=2)
    config = tiny_config(tmp_path, *SHORT, *RECIPES["muon"], "--backend.name", "fsdp")
    run_distributed(train, 2, config.to_json())
    expected = {step: loss for step, loss in losses(before).items() if step > 2}
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-5)
