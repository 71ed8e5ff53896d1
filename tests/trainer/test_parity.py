"""The same run under every backend, world size and way of computing: the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist import run_distributed
from tests.trainer.runs import lines, losses, tiny_config, train

WAYS = {
    "ddp on 2": (2, ["--backend.name", "ddp"]),
    "fsdp on 2": (2, ["--backend.name", "fsdp"]),
    "fsdp on 3, recomputing": (3, ["--backend.name", "fsdp", "--memory.checkpointing", "full"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transnext_pico", "transxnet_pico"])
def test_backends_and_world_sizes_agree(model: str, tmp_path: Path) -> None:
    alone = _run(tmp_path / "alone", 1, ["--model.name", model, "--backend.name", "ddp"])
    assert len(alone[0]) == 20
    assert alone[0][20] < alone[0][1] - 0.1, "it learns"
    for name, (world_size, arguments) in WAYS.items():
        found = _run(tmp_path / name, world_size, ["--model.name", model, *arguments])
        assert found[0] == pytest.approx(alone[0], abs=1e-5), name
        assert found[1] == pytest.approx(alone[1], abs=2.01), name  # one image of 50 may tip over


@pytest.mark.slow
def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", 1, ["--backend.name", "ddp"])
    for world_size, backend in ((1, "ddp"), (2, "fsdp")):
        arguments = ["--train.accumulate", "3", "--backend.name", backend]
        split = _run(tmp_path / f"split {backend}", world_size, arguments)
        assert split[0] == pytest.approx(whole[0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transnext_pico", "transxnet_pico"])
def test_bfloat16_stays_finite_and_near(model: str, tmp_path: Path) -> None:
    # Recomputation in bfloat16 has given NaN gradients on the CPU: keep it in.
    arguments = ["--model.name", model, "--memory.checkpointing", "1,3"]
    full = _run(tmp_path / "fp32", 1, arguments)
    half = _run(tmp_path / "bf16", 2, [*arguments, "--train.precision", "bf16"])
    assert half[0] == pytest.approx(full[0], abs=0.1)


def _run(run_dir: Path, world_size: int, arguments: list[str]) -> tuple[dict[int, float], list]:
    config = tiny_config(run_dir, *arguments)
    assert all(run_distributed(train, world_size, config.to_json(), timeout=300))
    evals = lines(run_dir, "eval")
    return losses(run_dir), [line[name] for line in evals for name in ("top1", "ema_top1")]
