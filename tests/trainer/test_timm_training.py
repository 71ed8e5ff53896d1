"""A timm classifier trains like ours: the same losses under every backend and world size."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file

from tests.dist import run_distributed
from tests.trainer.runs import lines, losses, tiny_config, train_all
from trainer.export import export_timm, load

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
    """A folder with the runs of every model in every way."""
    folder = tmp_path_factory.mktemp("runs")
    for world_size in (1, 2):
        configs = [
            tiny_config(folder / model / way, *SHORT, "--model.name", model, *arguments).to_json()
            for model in MODELS
            for way, (size, arguments) in WAYS.items()
            if size == world_size
        ]
        assert all(map(all, run_distributed(train_all, world_size, configs, timeout=300)))
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_backends_and_world_sizes_agree(model: str, folder: Path) -> None:
    loss, accuracy = _found(folder / model / ALONE)
    assert len(loss) == 5
    for way in WAYS:
        found = _found(folder / model / way)
        assert found[0] == pytest.approx(loss, abs=1e-5), way
        assert found[1] == pytest.approx(accuracy, abs=2.01), way  # one image of 50 may tip over


@pytest.mark.parametrize("model", MODELS)
def test_the_bundle_needs_nothing_of_ours(model: str, folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export_timm(load(folder / model / ALONE), bundle)  # which verifies it in a process of its own
    assert not (bundle / "foveate_model.py").exists()
    assert "foveate_model" not in (bundle / "README.md").read_text()
    weights = load_file(bundle / "model.safetensors")
    assert weights.keys() == timm.create_model(model.removeprefix("timm:")).state_dict().keys()


def _found(run_dir: Path) -> tuple[dict[int, float], list[float]]:
    """Return the losses by step, and the accuracies."""
    evals = lines(run_dir, "eval")
    return losses(run_dir), [line[name] for line in evals for name in ("top1", "ema_top1")]
