"""What changes from step to step, as pure functions of the step: nothing of it is state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import RunConfig
from .sections import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What the schedules say of one step.

    `lr` is that of parameters whose rate is not scaled; `drop_path` is the share of the model's
    drop-path rates that holds; `ema_decay` is the average's, 0 where there is none.
    """

    lr: float
    weight_decay: float
    drop_path: float
    ema_decay: float


def hyper_at(step: int, config: RunConfig, *, steps_per_epoch: int, total_steps: int) -> Hyper:
    """Return what holds for optimizer step `step` (from 0) of `total_steps`."""
    lr = learning_rate(step, config.optim, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    phase = step / total_steps
    return Hyper(
        lr=lr,
        weight_decay=weight_decay(phase, config.optim),
        drop_path=drop_path(phase, config.train.drop_path_ramp),
        ema_decay=ema_decay(step, config.train.ema_decay, warmup=config.train.ema_warmup),
    )


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


def weight_decay(phase: float, config: OptimConfig) -> float:
    """Return the weight decay at `phase` (0..1) of the run.

    A cosine from weight_decay to weight_decay_end (DINO, https://arxiv.org/abs/2104.14294).
    """
    if config.weight_decay_end is None:
        return config.weight_decay
    return config.weight_decay + (config.weight_decay_end - config.weight_decay) * _rise(phase)


def drop_path(phase: float, ramp: str) -> float:
    """Return the share of the drop-path rates that holds at `phase` (0..1) of the run."""
    return {"none": 1.0, "linear": phase, "cosine": _rise(phase)}[ramp]


def ema_decay(step: int, decay: float, *, warmup: bool) -> float:
    """Return the average's decay after optimizer step `step` (from 0).

    With a warm-up it is at most (1 + step) / (10 + step), so that a short past weighs little, as
    in TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def _rise(phase: float) -> float:
    """A half cosine from 0 to 1."""
    return 0.5 * (1 - math.cos(math.pi * phase))
