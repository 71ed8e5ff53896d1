"""What a backend promises beyond its losses: memory, steps left out, its part of the state."""

from __future__ import annotations

import gc
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.base import Backbone
from tests.dist import run_distributed
from trainer import zero_config
from trainer.backends.base import Backend, CanonicalState
from trainer.backends.wrap import PRODUCTS, build_model, wrap_blocks
from trainer.config import RunConfig, override
from trainer.engine import BACKENDS
from trainer.precision import LossScale, autocast
from trainer.recipes import recipe
from trainer.schedule import Hyper
from trainer.sections import MemoryConfig

CPU = torch.device("cpu")
HYPER = Hyper(lr=1e-2, weight_decay=0.05, drop_path=1.0, ema_decay=0.0)


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
        with autocast(CPU, backend.config.train.precision):
            logits = model(images, None)
        backend.backward(logits.float().square().mean() * factor)


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
            held = _tensor_bytes() - before
            parameters = sum(t.numel() for n, t in backend.export_state() if "weight/" in n)
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


FP16 = ["--train.precision", "fp16"]
WAYS = {
    "fsdp": ["--backend.name", "fsdp"],
    "fp16": ["--backend.name", "ddp", *FP16],
    "zero1, fp16": ["--backend.name", "zero1", *FP16],
    "zero3, fp16": ["--backend.name", "zero3", *FP16],
    "zero1": ["--backend.name", "zero1"],
    "zero3": ["--backend.name", "zero3"],
}
SCALING = ["loss_scale/good_steps", "loss_scale/scale"]


@pytest.fixture(scope="module")
def told():
    return run_distributed(_step_around_a_bad_one, 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_step_whose_gradients_are_not_finite_changes_nothing(way, told):
    for rank in told:
        assert rank[way]["skipped"] == [0.0, 1.0, 0.0]
        assert rank[way]["changed"] == (SCALING if "fp16" in way else [])
        assert rank[way]["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_state_that_is_taken_over_is_the_one_given(way, told):
    for rank in told:
        assert rank[way]["restored"]


def _step_around_a_bad_one(rank: int, world_size: int) -> dict[str, dict[str, object]]:
    return {way: step_around_a_bad_one(config(*arguments)) for way, arguments in WAYS.items()}


def step_around_a_bad_one(run: RunConfig) -> dict[str, object]:
    """Make three steps, the second with gradients that are not finite, and take the state back."""
    backend, model, _ = make(run)
    skipped, states = [], [local_state(backend)]
    for factor in (1.0, float("nan"), 1.0):
        backward(backend, model, factor=factor)
        skipped.append(float(backend.apply(HYPER).skipped))
        states.append(local_state(backend))
    first, before, after, last = states
    target = dict(backend.export_state())
    for name, tensor in target.items():
        local(tensor).copy_(first[name])
    backend.import_state(target)
    restored = local_state(backend)
    return {
        "skipped": skipped,
        "changed": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "steps": int(last["step"]),
        "norms": {name: float(tensor.double().norm()) for name, tensor in last.items()},
        "restored": all(torch.equal(restored[name], tensor) for name, tensor in first.items()),
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_state(backend: Backend) -> CanonicalState:
    """This process's part of the state, copied."""
    return {name: local(tensor).clone() for name, tensor in backend.export_state()}


class Products(TorchDispatchMode):
    """Counts the matrix products of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["transnext_pico", "transxnet_pico"])
def test_memory_is_saved_without_a_change_to_any_gradient(model):
    expected, count = _gradients(model, MemoryConfig())
    again = {}
    for way in ("full", "1,3", "selective"):
        found, again[way] = _gradients(model, MemoryConfig(checkpointing=way))
        assert all(torch.equal(found[name], expected[name]) for name in expected), way
    assert again["full"] > again["1,3"] > again["selective"] == count
    found, _ = _gradients(model, MemoryConfig(offload_activations=True))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _gradients(name: str, memory: MemoryConfig) -> tuple[CanonicalState, int]:
    model = build_model(replace(recipe("demo").model, name=name), seed=0, device=CPU)
    noise = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # biases that begin at zero would hide a mistake
        parameter.data.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    wrap_blocks(model, memory)
    with Products() as products:
        model(torch.randn(2, 3, 32, 32, generator=noise)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}, products.count


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
