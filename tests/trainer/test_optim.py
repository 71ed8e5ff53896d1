"""The schedule against timm's and the published numbers, AdamW against formulas in float64."""

import math
from dataclasses import replace

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from trainer.optim import Hyper, ParameterGroup, adamw, learning_rate, set_hyper
from trainer.recipes import recipe
from trainer.sections import OptimConfig

STEPS_PER_EPOCH = 1251  # ImageNet-1k in batches of 1,024


def schedule(name, **changes):
    config = recipe(name)
    optim = replace(config.optim, **changes)
    total = config.train.epochs * STEPS_PER_EPOCH

    def at(epoch):
        step = round(epoch * STEPS_PER_EPOCH)
        return learning_rate(step, optim, steps_per_epoch=STEPS_PER_EPOCH, total_steps=total)

    return at


def cosine(share):
    """The published cosine from 1e-3 to 1e-5, `share` of the way through."""
    return 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * share)) / 2


def test_the_published_schedule_of_transnext():
    at = schedule("transnext_base")
    assert at(0) == pytest.approx(1e-6)
    assert at(2.5) == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-3)
    # The phase counts from the first step: after the warm-up the cosine has already moved.
    assert at(5) == pytest.approx(cosine(5 / 300))
    assert at(150) == pytest.approx((1e-3 + 1e-5) / 2)
    assert at(300) == pytest.approx(1e-5)


def test_the_published_schedule_of_transxnet_cools_down():
    at = schedule("transxnet_t")
    assert at(5) == pytest.approx(1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * 5 / 300)) / 2)
    assert at(299.9) > 1e-5
    assert {at(300), at(305), at(310)} == {1e-5}


def test_no_warm_up_starts_at_the_peak():
    assert schedule("transnext_base", warmup_epochs=0.0)(0) == 1e-3


@pytest.mark.parametrize("name", ["transnext_tiny", "transxnet_s"])
def test_every_step_equals_timms_schedule(name):
    config = recipe(name)
    optim, steps_per_epoch = config.optim, 7
    theirs = CosineLRScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=optim.lr),
        t_initial=300 * steps_per_epoch,
        lr_min=optim.min_lr,
        warmup_t=int(optim.warmup_epochs) * steps_per_epoch,
        warmup_lr_init=optim.warmup_lr,
        t_in_epochs=False,
    )
    total = config.train.epochs * steps_per_epoch
    for step in range(total):
        theirs.step_update(step)
        expected = theirs.optimizer.param_groups[0]["lr"]
        mine = learning_rate(step, optim, steps_per_epoch=steps_per_epoch, total_steps=total)
        assert mine == pytest.approx(expected, rel=1e-12)


CONFIG = OptimConfig(lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
SHAPES = {"block.weight": (5, 3), "block.bias": (5,), "scale": (), "empty": (0, 4)}
GROUPS = [
    ParameterGroup(names=("block.weight",), decayed=True),
    ParameterGroup(names=("block.bias", "scale", "empty"), decayed=False),
]


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def step_with(optimizer, weights, grads, *, lr, found_inf=0.0):
    """One step as a backend makes it."""
    for name, weight in weights.items():
        weight.grad = grads[name]
    set_hyper(optimizer, Hyper(lr=lr, weight_decay=CONFIG.weight_decay))
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
