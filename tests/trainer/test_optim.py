"""AdamW against its formulas in float64."""

import math

import pytest
import torch

from trainer.optim import ParameterGroup, adamw, set_hyper
from trainer.schedule import Hyper
from trainer.sections import OptimConfig

CONFIG = OptimConfig(lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
SHAPES = {"block.weight": (5, 3), "block.bias": (5,), "scale": (), "empty": (0, 4)}
GROUPS = [
    ParameterGroup(names=("block.weight",), decayed=True),
    ParameterGroup(names=("block.bias", "scale", "empty"), decayed=False),
]


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def hyper(lr):
    return Hyper(lr=lr, weight_decay=CONFIG.weight_decay, drop_path=1.0, ema_decay=0.0)


def step_with(optimizer, weights, grads, *, lr, found_inf=0.0):
    """One step as a backend makes it."""
    for name, weight in weights.items():
        weight.grad = grads[name]
    set_hyper(optimizer, hyper(lr))
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()


def reference(weight, grads, rates, *, decay):
    """AdamW in float64, written from the paper's algorithm 2."""
    weight = weight.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    (beta1, beta2), eps = CONFIG.betas, CONFIG.eps
    for number, (grad, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        first = beta1 * first + (1 - beta1) * grad.double()
        second = beta2 * second + (1 - beta2) * grad.double() ** 2
        unbiased = (first / (1 - beta1**number)) / ((second / (1 - beta2**number)).sqrt() + eps)
        weight = weight - lr * (unbiased + decay * weight)
    return weight, first, second


def test_adamw_equals_its_formulas_with_and_without_decay():
    weights = tensors(0)
    start = {name: weight.clone() for name, weight in weights.items()}
    optimizer = adamw(weights, GROUPS, CONFIG)
    grads = [tensors(seed) for seed in range(1, 8)]
    rates = [CONFIG.lr * (1 + number) / 4 for number in range(len(grads))]
    for grad, lr in zip(grads, rates, strict=True):
        step_with(optimizer, weights, {k: v.clone() for k, v in grad.items()}, lr=lr)
    for name, weight in weights.items():
        decay = CONFIG.weight_decay if name == "block.weight" else 0.0
        mine = [grad[name] for grad in grads]
        expected = reference(start[name], mine, rates, decay=decay)
        held = optimizer.state[weight]
        found = (weight, held["exp_avg"], held["exp_avg_sq"])
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
        assert held["step"] == len(grads)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_found_infinite_leaves_everything_alone(bad):
    weights = tensors(0)
    optimizer = adamw(weights, GROUPS, CONFIG)
    step_with(optimizer, weights, tensors(1), lr=CONFIG.lr)
    before = everything(weights, optimizer)
    broken = {name: torch.full_like(grad, bad) for name, grad in tensors(2).items()}
    step_with(optimizer, weights, broken, lr=CONFIG.lr, found_inf=1.0)
    for value, expected in zip(everything(weights, optimizer), before, strict=True):
        assert torch.equal(value, expected)
    step_with(optimizer, weights, tensors(3), lr=CONFIG.lr)  # and the next good one counts
    assert not torch.equal(weights["block.weight"], before[0])
    assert optimizer.state[weights["scale"]]["step"] == 2


def everything(weights, optimizer):
    """Copies of all weights and all optimizer state, in a fixed order."""
    state = [value for name in weights for value in optimizer.state[weights[name]].values()]
    return [value.clone() for value in (*weights.values(), *state)]
