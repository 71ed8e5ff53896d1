"""Optimizers, over plain local tensors.

What a backend shards, it hands over as the local part of each parameter: an elementwise optimizer
does not care, and the same code serves every backend. The schedule is a pure function of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import Backbone

from .schedule import Hyper
from .sections import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters by name that weight decay applies to, or not."""

    names: tuple[str, ...]
    decayed: bool


def parameter_groups(model: Backbone) -> list[ParameterGroup]:
    """Return groups that name every parameter of `model` exactly once, none of them empty."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        names[not model.no_weight_decay(name, parameter)].append(name)
    return [
        ParameterGroup(names=tuple(found), decayed=key) for key, found in names.items() if found
    ]


def adamw(
    tensors: Mapping[str, Tensor], groups: Sequence[ParameterGroup], config: OptimConfig
) -> torch.optim.AdamW:
    """Return AdamW (https://arxiv.org/abs/1711.05101) over `tensors`; see `make_state`.

    The fused form is asked for because it can leave an update out on the device's own decision
    (`found_inf`), without a host sync.
    """
    return torch.optim.AdamW(
        [
            {"params": [tensors[name] for name in group.names], "decayed": group.decayed}
            for group in groups
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def make_state(optimizer: torch.optim.AdamW, tensors: Iterable[Tensor]) -> None:
    """Give the tensors that `optimizer` steps the state before its first step, to be saved."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }


def set_hyper(optimizer: torch.optim.Optimizer, hyper: Hyper) -> None:
    """Let the next step of an optimizer over `ParameterGroup`s be made with `hyper`."""
    for group in optimizer.param_groups:
        group["lr"] = hyper.lr
        group["weight_decay"] = hyper.weight_decay if group["decayed"] else 0.0
