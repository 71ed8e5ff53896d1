"""A timm classifier trains like ours: the same losses under every backend and world size."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file

from tests.dist import run_distributed
from tests.trainer.runs import lines, losses, tiny_config, train
from trainer.export import export_timm, load

WAYS = {
    "ddp": (2, ["--backend.name", "ddp"]),
    "fsdp, recomputing": (2, ["--backend.name", "fsdp", "--memory.checkpointing", "full"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["timm:test_vit", "timm:test_resnet"])
def test_backends_and_world_sizes_agree(model: str, tmp_path: Path) -> None:
    alone = _run(tmp_path / "alone", model, 1, ["--backend.name", "ddp"])
    assert len(alone[0]) == 5
    for name, (world_size, arguments) in WAYS.items():
        found = _run(tmp_path / name, model, world_size, arguments)
        assert found[0] == pytest.approx(alone[0], abs=1e-5), name
        assert found[1] == pytest.approx(alone[1], abs=2.01), name  # one image of 50 may tip over
    bundle = tmp_path / "bundle"
    export_timm(load(tmp_path / "alone"), bundle)  # which verifies it in a process of its own
    assert not (bundle / "foveate_model.py").exists()
    assert "foveate_model" not in (bundle / "README.md").read_text()
    weights = load_file(bundle / "model.safetensors")
    assert weights.keys() == timm.create_model(model.removeprefix("timm:")).state_dict().keys()


def _run(
    run_dir: Path, model: str, world_size: int, arguments: list[str]
) -> tuple[dict[int, float], list[float]]:
    shared = ["--model.name", model, "--model.img-size", "32", "--train.epochs", "1"]
    config = tiny_config(run_dir, *shared, "--eval.every-epochs", "1", *arguments)
    run_dir.mkdir()
    (run_dir / "config.json").write_text(config.to_json())
    assert all(run_distributed(train, world_size, config.to_json(), timeout=300))
    evals = lines(run_dir, "eval")
    return losses(run_dir), [line[name] for line in evals for name in ("top1", "ema_top1")]
