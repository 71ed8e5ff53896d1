"""A timm classifier trains like ours: the same losses under every backend and world size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist import run_distributed
from tests.trainer.runs import lines, losses, tiny_config, train

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


def _run(
    run_dir: Path, model: str, world_size: int, arguments: list[str]
) -> tuple[dict[int, float], list[float]]:
    shared = ["--model.name", model, "--model.img-size", "32", "--train.epochs", "1"]
    config = tiny_config(run_dir, *shared, "--eval.every-epochs", "1", *arguments)
    assert all(run_distributed(train, world_size, config.to_json(), timeout=300))
    evals = lines(run_dir, "eval")
    return losses(run_dir), [line[name] for line in evals for name in ("top1", "ema_top1")]
