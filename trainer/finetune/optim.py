"""What a fine-tuning step is made by: parameter groups and the schedule, as functions."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import nn
from torch.optim import AdamW

from trainer.optim import lr_scales

from .settings import OptimSettings
from .trunk import Trunk


def make_optimizer(model: nn.Module, settings: OptimSettings) -> AdamW:
    """Return AdamW over the trainable parameters of a head with its trunk.

    Every group's `scale` is its factor on the learning rate: the backbone's, times the layers'
    decay where there is one (BEiT, https://arxiv.org/abs/2106.08254). Norms are not decayed, nor
    what the backbone's own recipe exempts.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    scales, exempt = _backbone_rules(model, settings)
    norms = _norm_parameters(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = id(parameter) not in norms and not exempt.get(id(parameter), False)
            groups[scales.get(id(parameter), 1.0), decayed].append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "scale": scale,
                "lr": settings.lr * scale,
                "weight_decay": settings.weight_decay * decayed,
            }
            for (scale, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]
    )


def _backbone_rules(
    model: nn.Module, settings: OptimSettings
) -> tuple[dict[int, float], dict[int, bool]]:
    """Return the learning rate's factor of each of the trunk's parameters and which are exempt."""
    scales: dict[int, float] = {}
    exempt: dict[int, bool] = {}
    for trunk in (module for module in model.modules() if isinstance(module, Trunk)):
        by_layer = lr_scales(trunk.backbone, settings.layer_decay)
        for parameter in trunk.parameters():
            scales[id(parameter)] = settings.backbone_lr * by_layer.get(id(parameter), 1.0)
        for name, parameter in trunk.backbone.named_parameters():
            exempt[id(parameter)] = trunk.backbone.no_weight_decay(name, parameter)
    return scales, exempt


def _norm_parameters(model: nn.Module) -> set[int]:
    norms = (m for m in model.modules() if "Norm" in type(m).__name__)
    return {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}


def set_lr(optimizer: AdamW, lr: float) -> None:
    """Set the learning rate of every group from the head's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def learning_rate(step: int, settings: OptimSettings, *, total_steps: int) -> float:
    """Return the head's learning rate of optimizer step `step` (from 0).

    The warm-up multiplies the schedule, which counts from step 0, as the OpenMMLab configurations
    of both papers have it.
    """
    factor = 1.0
    if step < settings.warmup_steps:
        done = step / settings.warmup_steps
        factor = settings.warmup_start + (1 - settings.warmup_start) * done
    return settings.lr * factor * _scheduled(step / total_steps, settings)


def _scheduled(progress: float, settings: OptimSettings) -> float:
    """Return the schedule's factor at `progress` (0..1) of the training."""
    if settings.schedule == "step":
        passed = sum(progress >= milestone for milestone in settings.milestones)
        return float(0.1**passed)
    if settings.schedule == "poly":
        return float((1 - progress) ** settings.power)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
