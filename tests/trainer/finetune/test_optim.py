"""Parameter groups and schedules of fine-tuning, against their formulas."""

import math

import pytest
import torch
from torch import nn

from models.registry import build
from trainer.finetune.optim import learning_rate, make_optimizer, set_lr
from trainer.finetune.settings import OptimSettings
from trainer.finetune.trunk import Trunk


def rates(settings, total_steps=100):
    return [learning_rate(step, settings, total_steps=total_steps) for step in range(total_steps)]


def test_the_step_schedule_falls_by_a_tenth_at_its_milestones():
    found = rates(OptimSettings(lr=1.0, milestones=(0.5, 0.75), warmup_steps=0))
    assert found == pytest.approx([1.0] * 50 + [0.1] * 25 + [0.01] * 25)


def test_poly_and_cosine_fall_to_nothing():
    poly = rates(OptimSettings(lr=2.0, schedule="poly", power=0.9, warmup_steps=0))
    assert poly == pytest.approx([2 * (1 - step / 100) ** 0.9 for step in range(100)])
    cosine = rates(OptimSettings(lr=2.0, schedule="cosine", warmup_steps=0))
    assert cosine == pytest.approx([1 + math.cos(math.pi * step / 100) for step in range(100)])


def test_the_warm_up_is_a_line_to_the_schedule():
    settings = OptimSettings(lr=1.0, schedule="constant", warmup_steps=10, warmup_start=0.1)
    found = rates(settings)
    assert found[:10] == pytest.approx([0.1 + 0.09 * step for step in range(10)])
    assert found[10:] == [1.0] * 90


def test_every_weight_has_the_rate_and_the_decay_that_are_its_own():
    backbone = build("transnext_pico", img_size=32, drop_path=0.0)
    model = nn.ModuleDict(
        {"trunk": Trunk(backbone), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)}
    )
    settings = OptimSettings(lr=1.0, backbone_lr=0.1, layer_decay=0.5, weight_decay=0.05)
    optimizer = make_optimizer(model, settings)
    set_lr(optimizer, 2.0)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(map(id, trained))
    assert found[id(model["head"].weight)] == (2.0, 0.05)
    assert found[id(model["head"].bias)] == (2.0, 0.05)
    assert found[id(model["norm"].weight)] == (2.0, 0.0)
    for block in backbone.blocks():
        if block.residual:
            for name, parameter in block.module.named_parameters():
                above = backbone.num_blocks - block.depth
                rate, decay = found[id(parameter)]
                assert rate == pytest.approx(0.2 * 0.5**above)
                exempt = backbone.no_weight_decay(f"{block.name}.{name}", parameter)
                assert decay == (0.0 if exempt else 0.05)


def test_what_is_frozen_is_not_stepped():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(model, OptimSettings())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
    assert isinstance(optimizer, torch.optim.AdamW)
