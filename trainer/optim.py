"""Optimizers, over plain local tensors: which parameters are stepped how, and what by.

What a backend shards, it hands over as the local part of each parameter: an elementwise optimizer
does not care, and the same code serves every backend. Those that need whole parameters ask the
backend for what they need of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.base import Backbone

from .config import UserError
from .lamb import LAMB
from .muon import Muon
from .schedule import Hyper
from .sections import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters by name that are stepped alike.

    `decayed` says whether weight decay applies to them, `lr_scale` is a factor on the learning
    rate, and `orthogonal` says that they are matrices to Muon.
    """

    names: tuple[str, ...]
    decayed: bool
    lr_scale: float = 1.0
    orthogonal: bool = False


class Shards(Protocol):
    """What an optimizer may ask of the backend about whole parameters."""

    def canonical(self, name: str, local: Tensor) -> Tensor:
        """See Backend.canonical."""
        ...

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """See TorchBackend.sum_over_shards."""
        ...


def parameter_groups(model: Backbone, config: OptimConfig) -> list[ParameterGroup]:
    """Return groups that name every parameter of `model` exactly once, none of them empty.

    Raises:
        UserError: if they depend on residual blocks and the model has none.
    """
    by_block = config.layer_decay < 1 or config.name == "muon"
    if by_block and not any(block.residual for block in model.blocks()):
        raise UserError(
            "the model has no residual blocks for optim.layer_decay or optim.name muon to go by: "
            "leave layer_decay at 1 and name at adamw"
        )
    scales = lr_scales(model, config.layer_decay)
    matrices = _hidden_matrices(model) if config.name == "muon" else set()
    names: dict[tuple[bool, float, bool], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        decayed = not model.no_weight_decay(name, parameter)
        names[decayed, scales[id(parameter)], id(parameter) in matrices].append(name)
    return [
        ParameterGroup(
            names=tuple(found), decayed=decayed, lr_scale=lr_scale, orthogonal=orthogonal
        )
        for (decayed, lr_scale, orthogonal), found in sorted(names.items(), reverse=True)
    ]


def lr_scales(model: Backbone, decay: float) -> dict[int, float]:
    """Return a factor on the learning rate for each parameter's id.

    It is 1 for the head and falls by `decay` with every residual block towards the stem, which is
    a layer of its own (BEiT, https://arxiv.org/abs/2106.08254, and MAE in fine-tuning).
    """
    scales: dict[int, float] = {}
    for block in model.blocks():
        is_stem = block.depth == 0 and not block.residual
        layers_above = model.num_blocks - block.depth + is_stem
        scales |= {id(parameter): decay**layers_above for parameter in block.module.parameters()}
    return scales


def _hidden_matrices(model: Backbone) -> set[int]:
    """Return the ids of the weights of linear layers and dense convolutions in residual blocks."""
    modules = (m for b in model.blocks() if b.residual for m in b.module.modules())
    return {
        id(module.weight)
        for module in modules
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def make_optimizer(
    tensors: Mapping[str, Tensor],
    groups: Sequence[ParameterGroup],
    config: OptimConfig,
    shards: Shards,
) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names over the local parts `tensors` of parameters.

    Before each step, set its `found_inf` (float32 [], on the device): 1.0 leaves the step out
    there, without a host sync. See `make_state` and `set_hyper`.
    """
    if config.name == "lamb":
        return LAMB(
            _described(tensors, groups),
            betas=config.betas,
            eps=config.eps,
            sum_over_shards=shards.sum_over_shards,
        )
    if config.name == "muon":
        return Muon(
            _described(tensors, groups),
            names={tensor: name for name, tensor in tensors.items()},
            dress=shards.canonical,
            momentum=config.momentum,
            betas=config.betas,
            eps=config.eps,
        )
    return adamw(tensors, groups, config)


def adamw(
    tensors: Mapping[str, Tensor], groups: Sequence[ParameterGroup], config: OptimConfig
) -> torch.optim.AdamW:
    """Return AdamW (https://arxiv.org/abs/1711.05101) over `tensors`; see `make_state`.

    The fused form is asked for because it can leave an update out on the device's own decision
    (`found_inf`), without a host sync.
    """
    groups_of_tensors = _described(tensors, groups)
    return torch.optim.AdamW(groups_of_tensors, betas=config.betas, eps=config.eps, fused=True)


def _described(
    tensors: Mapping[str, Tensor], groups: Sequence[ParameterGroup]
) -> list[dict[str, Any]]:
    """Return groups as torch's optimizers take them."""
    return [
        {
            "params": [tensors[name] for name in group.names],
            "decayed": group.decayed,
            "lr_scale": group.lr_scale,
            "orthogonal": group.orthogonal,
        }
        for group in groups
    ]


def make_state(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Give the tensors that `optimizer` steps the state before its first step, to be saved.

    Muon's matrices have no second moment.
    """
    groups = (group for group in optimizer.param_groups if group["orthogonal"])
    matrices = {id(tensor) for group in groups for tensor in group["params"]}
    for tensor in tensors:
        state = optimizer.state[tensor]
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state["exp_avg"] = torch.zeros_like(tensor)
        if id(tensor) not in matrices:
            state["exp_avg_sq"] = torch.zeros_like(tensor)


def set_hyper(optimizer: torch.optim.Optimizer, hyper: Hyper) -> None:
    """Let the next step of an optimizer over `ParameterGroup`s be made with `hyper`."""
    for group in optimizer.param_groups:
        group["lr"] = hyper.lr * group["lr_scale"]
        group["weight_decay"] = hyper.weight_decay if group["decayed"] else 0.0
