"""The same run under every backend, world size and way of computing: the same losses.

Runs of one world size are trained one after the other in the same processes: starting processes
takes longer than the runs do.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist import run_distributed
from tests.trainer.runs import lines, losses, tiny_config, train_all
from trainer.loop import BACKENDS

MODELS = ("transnext_pico", "transxnet_pico")
WAYS = {
    **{f"{name} on 2": (2, ["--backend.name", name]) for name in BACKENDS},
    "fsdp on 3, recomputing": (3, ["--backend.name", "fsdp", "--memory.checkpointing", "full"]),
}
SPLIT = ["--model.name", MODELS[0], "--train.accumulate", "3", "--backend.name"]
# Recomputation in bfloat16 has given NaN gradients on the CPU: keep it in.
HALF = ["--memory.checkpointing", "1,3", "--train.precision"]
STEPS = 5
SHORT = ["--train.epochs", "1", "--optim.warmup-epochs", "0.4", "--eval.every-epochs", "1"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def runs():
    """Return name -> (world size, arguments) of every run that is compared with another."""
    named = {"split on 1": (1, [*SPLIT, "ddp"]), "split on 2": (2, [*SPLIT, "fsdp"])}
    for model in MODELS:
        ways = WAYS | {
            "alone": (1, ["--backend.name", "ddp"]),
            "fp32": (1, [*HALF, "fp32"]),
            "bf16": (2, [*HALF, "bf16"]),
        }
        for way, (world_size, arguments) in ways.items():
            named[f"{model}, {way}"] = (world_size, ["--model.name", model, *arguments])
    return named


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every run came to: its losses by step, and its accuracies."""
    folder = tmp_path_factory.mktemp("runs")
    named = runs()
    for world_size in sorted({size for size, _ in named.values()}):
        configs = [
            tiny_config(folder / name, *SHORT, *arguments).to_json()
            for name, (size, arguments) in named.items()
            if size == world_size
        ]
        complete = run_distributed(train_all, world_size, configs, timeout=600)
        assert all(map(all, complete))
    return {name: (losses(folder / name), accuracies(folder / name)) for name in named}


def accuracies(run_dir: Path) -> list[float]:
    return [line[name] for line in lines(run_dir, "eval") for name in ("top1", "ema_top1")]


@pytest.mark.parametrize("model", MODELS)
def test_backends_and_world_sizes_agree(model, found):
    loss, accuracy = found[f"{model}, alone"]
    assert len(loss) == STEPS
    assert loss[STEPS] < loss[1] - 0.1, "it learns"
    for way in WAYS:
        other = found[f"{model}, {way}"]
        assert other[0] == pytest.approx(loss, abs=1e-5), way
        assert other[1] == pytest.approx(accuracy, abs=2.01), way  # one image of 50 may tip over


@pytest.mark.parametrize("name", ["split on 1", "split on 2"])
def test_accumulation_does_not_change_the_step(name, found):
    assert found[name][0] == pytest.approx(found[f"{MODELS[0]}, alone"][0], abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_stays_finite_and_near(model, found):
    half, full = (found[f"{model}, {precision}"][0] for precision in ("bf16", "fp32"))
    assert half == pytest.approx(full, abs=0.1)
