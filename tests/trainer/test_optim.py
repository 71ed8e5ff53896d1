"""Every optimizer against its formulas in float64, and which parameters are stepped how."""

import math
from dataclasses import replace

import pytest
import torch
from timm.optim import Lamb, param_groups_layer_decay

from models.registry import build
from trainer.config import UserError, override
from trainer.muon import orthogonalise
from trainer.optim import ParameterGroup, make_optimizer, make_state, parameter_groups, set_hyper
from trainer.recipes import recipe
from trainer.schedule import Hyper
from trainer.sections import OptimConfig

CONFIG = OptimConfig(lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, momentum=0.9)
SHAPES = {"block.weight": (5, 3), "block.conv": (3, 2, 2, 2), "block.bias": (5,), "scale": ()}
SHAPES["empty"] = (0, 4)
MATRICES = ("block.weight", "block.conv")
NAMES = ("adamw", "lamb", "muon")


class Whole:
    """What a backend that divides nothing tells an optimizer."""

    def canonical(self, name, local):
        return local

    def sum_over_shards(self, value):
        return value


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def optimizer_of(name, weights):
    """The optimizer, with its state made, as a backend makes it."""
    groups = [
        ParameterGroup(names=MATRICES, decayed=True, orthogonal=name == "muon", lr_scale=0.5),
        ParameterGroup(names=("block.bias", "scale", "empty"), decayed=False),
    ]
    optimizer = make_optimizer(weights, groups, replace(CONFIG, name=name), Whole())
    make_state(optimizer, weights.values())
    return optimizer


def step_with(optimizer, weights, grads, *, lr, found_inf=0.0):
    """One step as a backend makes it."""
    for name, weight in weights.items():
        weight.grad = grads[name].clone()
    hyper = Hyper(lr=lr, weight_decay=CONFIG.weight_decay, drop_path=1.0, ema_decay=0.0)
    set_hyper(optimizer, hyper)
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()


def adam(number, weight, grad, first, second):
    """Adam's direction and moments, from https://arxiv.org/abs/1412.6980's algorithm 1."""
    (beta1, beta2), eps = CONFIG.betas, CONFIG.eps
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad**2
    direction = (first / (1 - beta1**number)) / ((second / (1 - beta2**number)).sqrt() + eps)
    return direction, first, second


def adamw_step(number, weight, grad, first, second, *, lr, decay):
    direction, first, second = adam(number, weight, grad, first, second)
    return weight - lr * (direction + decay * weight), first, second


def lamb_step(number, weight, grad, first, second, *, lr, decay):
    """From https://arxiv.org/abs/1904.00962's algorithm 2."""
    direction, first, second = adam(number, weight, grad, first, second)
    direction = direction + decay * weight
    ratio = weight.norm() / direction.norm() if decay > 0 else 1.0
    return weight - lr * ratio * direction, first, second


def muon_step(number, weight, grad, first, second, *, lr, decay):
    """By singular values, which the five quintics act on, where the code multiplies matrices."""
    if decay == 0:
        return adamw_step(number, weight, grad, first, second, lr=lr, decay=decay)
    first = CONFIG.momentum * first + (1 - CONFIG.momentum) * grad
    ahead = CONFIG.momentum * first + (1 - CONFIG.momentum) * grad
    left, values, right = torch.linalg.svd(ahead.flatten(1), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    orthogonal = (left @ values.diag() @ right).view(weight.shape)
    rows, columns = weight.flatten(1).shape
    scale = 0.2 * math.sqrt(max(rows, columns))
    return weight - lr * (scale * orthogonal + decay * weight), first, second


STEPS = {"adamw": adamw_step, "lamb": lamb_step, "muon": muon_step}


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_its_formulas_with_and_without_decay(name):
    weights = tensors(0)
    start = {key: weight.double() for key, weight in weights.items()}
    optimizer = optimizer_of(name, weights)
    grads = [tensors(seed) for seed in range(1, 8)]
    rates = [CONFIG.lr * (1 + number) / 4 for number in range(len(grads))]
    for grad, lr in zip(grads, rates, strict=True):
        step_with(optimizer, weights, grad, lr=lr)
    for key, weight in weights.items():
        decay, lr_scale = (CONFIG.weight_decay, 0.5) if key in MATRICES else (0.0, 1.0)
        wanted = (start[key], torch.zeros_like(start[key]), torch.zeros_like(start[key]))
        for number, (grad, lr) in enumerate(zip(grads, rates, strict=True), start=1):
            own, (value, first, second) = grad[key].double(), wanted
            lr = lr * lr_scale
            wanted = STEPS[name](number, value, own, first, second, lr=lr, decay=decay)
        held = optimizer.state[weight]
        found = (weight, held["exp_avg"], held.get("exp_avg_sq", wanted[2]))
        for value, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-6)
        assert held["step"] == len(grads)


def test_lamb_is_timms():
    ours, theirs = tensors(0), tensors(0)
    names = [name for name, shape in SHAPES.items() if 0 not in shape]
    optimizer = optimizer_of("lamb", ours)
    groups = [
        {"params": [theirs[name] for name in MATRICES], "weight_decay": 0.1, "lr": 0.015},
        {"params": [theirs["block.bias"], theirs["scale"]], "weight_decay": 0.0, "lr": 0.03},
    ]
    other = Lamb(groups, betas=CONFIG.betas, eps=CONFIG.eps, max_grad_norm=None)
    for seed in range(1, 4):
        step_with(optimizer, ours, tensors(seed), lr=CONFIG.lr)
        for name, grad in tensors(seed).items():
            theirs[name].grad = grad
        other.step()
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_muon_is_torchs_but_for_its_rounding():
    ours = torch.randn(3, 24, 40)
    theirs = ours.clone()
    moves = orthogonalise(ours)
    for matrix, move in zip(theirs, moves, strict=True):
        weight = torch.zeros_like(matrix)
        weight.grad = matrix
        settings = {"weight_decay": 0.0, "momentum": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        torch.optim.Muon([weight], lr=1 / (0.2 * math.sqrt(40)), **settings).step()
        torch.testing.assert_close(-weight, move, rtol=0, atol=0.02)  # it computes in bfloat16


def test_orthogonal_matrices_of_any_shape():
    for shape in ((2, 8, 8), (1, 4, 9), (3, 9, 4)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape).double()))
        assert values.min() > 0.6
        assert values.max() < 1.3
    assert not orthogonalise(torch.zeros(1, 3, 2)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_found_infinite_leaves_everything_alone(bad, name):
    weights = tensors(0)
    optimizer = optimizer_of(name, weights)
    broken = {key: torch.full_like(grad, bad) for key, grad in tensors(2).items()}
    for grads in (None, tensors(1)):  # before the first good step, and after it
        if grads is not None:
            step_with(optimizer, weights, grads, lr=CONFIG.lr)
        before = everything(weights, optimizer)
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


def on_meta(name):
    with torch.device("meta"):
        return build(name, img_size=32, num_classes=4)


def stepped_how(model, **changes):
    """The group of every parameter, by name."""
    groups = parameter_groups(model, replace(CONFIG, **changes))
    return {name: group for group in groups for name in group.names}


def test_layer_decay_is_that_of_fine_tuning_elsewhere():
    model = on_meta("timm:test_vit")
    found = stepped_how(model, layer_decay=0.5)
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    assert set(found) == set(parameters.values())
    exempt = model.net.no_weight_decay()
    for group in param_groups_layer_decay(model.net, 0.1, exempt, layer_decay=0.5):
        for parameter in group["params"]:
            name = parameters[id(parameter)]
            # timm counts the last norm to the last block; in BEiT and MAE it goes with the head.
            expected = 1.0 if name.startswith("net.norm.") else group["lr_scale"]
            assert found[name].lr_scale == expected, name
            assert found[name].decayed == (group["weight_decay"] > 0), name


def test_layer_decay_of_a_hierarchy_rises_from_stem_to_head():
    model = on_meta("transnext_pico")  # 1, 1, 2 and 1 blocks
    found = {name: group.lr_scale for name, group in stepped_how(model, layer_decay=0.5).items()}
    assert found["head.weight"] == found["head.bias"] == 1
    for block in model.blocks():
        for name, _ in block.module.named_parameters():
            stem = not block.residual and block.depth == 0
            assert found[f"{block.name}.{name}"] == 0.5 ** (5 - block.depth + stem)


def test_without_layer_decay_there_are_two_groups():
    groups = parameter_groups(on_meta("transnext_pico"), CONFIG)
    assert [(group.decayed, group.lr_scale, group.orthogonal) for group in groups] == [
        (True, 1.0, False),
        (False, 1.0, False),
    ]


@pytest.mark.parametrize("name", ["transnext_pico", "transxnet_pico", "timm:test_vit"])
def test_muon_takes_the_matrices_of_hidden_layers(name):
    model = on_meta(name)
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    found = {key for key, group in stepped_how(model, name="muon").items() if group.orthogonal}
    assert found
    for key in found:  # rows and columns, of which depthwise kernels have no columns
        assert shapes[key][1] > 1, key
    blocks = tuple(f"{block.name}." for block in model.blocks() if block.residual)
    wide = {
        key
        for key, shape in shapes.items()
        if key.startswith(blocks) and len(shape) in (2, 4) and shape[1] > 8 and shape[0] > 16
    }
    assert wide <= found


@pytest.mark.parametrize("changes", [{"layer_decay": 0.9}, {"name": "muon"}])
def test_what_goes_by_blocks_needs_some(changes):
    model = on_meta("timm:vgg11")
    parameter_groups(model, CONFIG)
    with pytest.raises(UserError, match="no residual blocks"):
        parameter_groups(model, replace(CONFIG, **changes))


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_what_deepspeed_cannot_step_is_refused(name):
    with pytest.raises(UserError, match=f"optim.name {name} needs parameters one by one"):
        override(recipe("demo"), ["--optim.name", name, "--backend.name", "zero2"])


@pytest.mark.parametrize("value", ["0", "1.5"])
def test_a_layer_decay_out_of_range_is_refused(value):
    with pytest.raises(UserError, match=r"optim\.layer_decay is"):
        override(recipe("demo"), ["--optim.layer-decay", value])
