"""A timm classifier trains like ours: the same losses under every backend and world size."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file

from tests.trainer.runs import train_named
from trainer.exports.formats import export
from trainer.exports.source import load

MODELS = ("timm:test_vit", "timm:test_resnet")
ALONE = "ddp on 1"
WAYS = {
    ALONE: (1, ["--backend.name", "ddp"]),
    "ddp on 2": (2, ["--backend.name", "ddp"]),
    "fsdp on 2, recomputing": (2, ["--backend.name", "fsdp", "--memory.checkpointing", "full"]),
}
SHORT = ["--model.img-size", "32", "--train.epochs", "1", "--eval.every-epochs", "1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of every model in every way are kept."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, tuple[dict[int, float], list[float]]]:
    """What every run came to."""
    named = {
        f"{model}/{way}": (world_size, [*SHORT, "--model.name", model, *arguments])
        for model in MODELS
        for way, (world_size, arguments) in WAYS.items()
    }
    return train_named(folder, named)


@pytest.mark.parametrize("model", MODELS)
def test_backends_and_world_sizes_agree(
    model: str, found: dict[str, tuple[dict[int, float], list[float]]]
) -> None:
    loss, accuracy = found[f"{model}/{ALONE}"]
    assert len(loss) == 5
    for way in WAYS:
        other = found[f"{model}/{way}"]
        assert other[0] == pytest.approx(loss, abs=1e-5), way
        assert other[1] == pytest.approx(accuracy, abs=2.01), way  # one image of 50 may tip over


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("model", MODELS)
def test_the_bundle_needs_nothing_of_ours(model: str, folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export(load(folder / model / ALONE), bundle, form="timm")  # which verifies it
    assert not (bundle / "foveate_model.py").exists()
    assert "foveate_model" not in (bundle / "README.md").read_text()
    weights = load_file(bundle / "model.safetensors")
    assert weights.keys() == timm.create_model(model.removeprefix("timm:")).state_dict().keys()
