"""Optimizers and their schedules, over plain local tensors.

What a backend shards, it hands over as the local part of each parameter: an elementwise optimizer
does not care, and the same code serves every backend. The schedule is a pure function of the step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .sections import OptimConfig


def adamw(tensors: dict[str, Tensor], decayed: set[str], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW (https://arxiv.org/abs/1711.05101) over `tensors`, with its state made.

    `decayed` names the tensors that weight decay applies to. The fused form is asked for because
    it can leave an update out on the device's own decision (`found_inf`), without a host sync.
    """
    groups: list[dict[str, Any]] = [
        {"params": [t for name, t in tensors.items() if name in decayed]},
        {"params": [t for name, t in tensors.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for tensor in tensors.values():
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }
    return optimizer


def learning_rate(
    step: int, config: OptimConfig, *, steps_per_epoch: int, total_steps: int
) -> float:
    """Return the learning rate of optimizer step `step` (from 0).

    A linear warm-up to the peak, then a cosine (https://arxiv.org/abs/1608.03983) to min_lr whose
    phase counts from step 0, as in the schedule both papers used, then min_lr in cool-down.
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch
    cosine_steps = total_steps - config.cooldown_epochs * steps_per_epoch
    if step < warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup_steps
    phase = min(step / cosine_steps, 1.0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * phase))
