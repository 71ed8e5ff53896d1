"""What a backend promises beyond its losses: memory, steps left out, its part of the state."""

from __future__ import annotations

import gc
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from models.base import Backbone
from tests.dist import run_distributed
from trainer import zero_config
from trainer.backends.base import Backend, CanonicalState
from trainer.backends.wrap import build_model
from trainer.config import RunConfig, override
from trainer.loop import BACKENDS
from trainer.optim import Hyper
from trainer.precision import LossScale
from trainer.recipes import recipe

CPU = torch.device("cpu")
HYPER = Hyper(lr=1e-2, weight_decay=0.05)


def config(*arguments: str) -> RunConfig:
    """The demo's configuration at 32 pixels."""
    return override(recipe("demo"), arguments)


def make(run: RunConfig) -> tuple[Backend, torch.nn.Module, Backbone]:
    bare = build_model(run.model, seed=0, device=CPU)
    backend = BACKENDS[run.backend.name](CPU, run)
    return backend, backend.setup(bare), bare


def backward(backend: Backend, model: torch.nn.Module, *, factor: float = 1.0) -> None:
    """The gradients of a step whose data depend on the rank."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(dist.get_rank()))
    with backend.micro_batch(last=True):
        backend.backward(model(images, None).square().mean() * factor)


def whole(backend: Backend) -> CanonicalState:
    """The state of all ranks, copied."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in backend.export_state()
    }


@pytest.mark.slow
def test_on_four_processes_a_quarter_of_the_state_is_held():
    """16 bytes per parameter: fp32 weight and gradient, and AdamW's two moments."""
    for shares in run_distributed(_shares_held, 4):
        assert shares == pytest.approx({"fsdp": 0.25, "zero3": 0.25}, rel=0.1)


def _shares_held(rank: int, world_size: int) -> dict[str, float]:
    found = {}
    for name in ("fsdp", "zero3"):
        # What travels between processes is no state: let it be small beside it.
        with mock.patch.object(zero_config, "BUCKET", 1024):
            before = _tensor_bytes()
            backend, model, bare = make(config("--backend.name", name))
            backward(backend, model)
            backend.apply(HYPER)
            backward(backend, model)
            held = _tensor_bytes() - before
            parameters = sum(t.numel() for n, t in whole(backend).items() if n.startswith("weight"))
            found[name] = held / (16 * parameters)
            del backend, model, bare
    return found


def _tensor_bytes() -> int:
    """The memory of all tensors of this process that Python knows of."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
            local = found.to_local() if isinstance(found, DTensor) else found
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


WAYS = {
    "ddp": ["--backend.name", "ddp"],
    "fsdp": ["--backend.name", "fsdp"],
    "fp16": ["--backend.name", "ddp", "--train.precision", "fp16"],
    "zero1": ["--backend.name", "zero1"],
    "zero2": ["--backend.name", "zero2", "--backend.offload", "optimizer"],
    "zero3": ["--backend.name", "zero3"],
}


@pytest.fixture(scope="module")
def told():
    return run_distributed(_step_around_a_bad_one, 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_step_whose_gradients_are_not_finite_changes_nothing(way, told):
    for rank in told:
        assert rank[way] == {
            "skipped": [0.0, 1.0, 0.0],
            "changed_by_bad": []
            if way != "fp16"
            else ["loss_scale/good_steps", "loss_scale/scale"],
            "steps": 2.0,
            "restored": True,
        }


def _step_around_a_bad_one(rank: int, world_size: int) -> dict[str, dict[str, object]]:
    return {way: _steps(config(*arguments)) for way, arguments in WAYS.items()}


def _steps(run: RunConfig) -> dict[str, object]:
    backend, model, _ = make(run)
    states, skipped = [whole(backend)], []
    for factor in (1.0, float("nan"), 1.0):
        backward(backend, model, factor=factor)
        info = backend.apply(HYPER)
        skipped.append(float(info.skipped))
        states.append(whole(backend))
    before, after = states[1], states[2]
    target = dict(backend.export_state())
    for name, tensor in target.items():
        tensor.copy_(_like(states[0][name], tensor))
    backend.import_state(target)
    restored = whole(backend)
    return {
        "skipped": skipped,
        "changed_by_bad": sorted(n for n in before if not torch.equal(before[n], after[n])),
        "steps": float(states[3]["step"]),
        "restored": all(torch.equal(restored[name], states[0][name]) for name in restored),
    }


def _like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements)


def test_the_loss_scale_halves_at_once_and_doubles_after_two_thousand_good_steps():
    scaling = LossScale(CPU)
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    scales = []
    for skipped in (bad, bad, *[good] * 1999, bad, *[good] * 2000, *[good] * 2000):
        scaling.update(skipped)
        scales.append(float(scaling.scale))
    begin = 2.0**16
    assert scales[:2] == [begin / 2, begin / 4]
    assert scales[2000] == begin / 4, "1,999 were not enough"
    assert scales[2001] == begin / 8
    assert scales[4000] == begin / 8
    assert scales[4001] == begin / 4
    assert scales[-1] == begin / 2
