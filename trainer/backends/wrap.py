"""From a model's name to a model that is ready to be sharded: the one place that wraps blocks.

Order: meta device -> materialise, NaN-filled so that a forgotten initialisation is loud -> weights
and buffers -> activation checkpointing around compilation, block by block. Weights are drawn
before sharding, from the seed alone, so that every backend and world size starts from the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.base import Backbone
from models.layers import BatchNorm, recomputing
from models.registry import build
from trainer.sections import MemoryConfig, ModelConfig

# All blocks are one function to the compiler, which keeps a version for each stage and mode. Our
# maps [B, H, W, C] have their channels last already; rearranged on the way to convolutions, as the
# compiler would, they come out transposed, and tens of times slower.
COMPILE: dict[str, Any] = {
    "dynamic": False,
    "recompile_limit": 32,
    "options": {"layout_optimization": False},
}


def build_model(config: ModelConfig, *, seed: int, device: torch.device) -> Backbone:
    """Return an initialised model on `device`, equal on all ranks.

    Raises:
        ModelError: if the model does not exist or cannot take these settings.
        RuntimeError: if a weight was left uninitialised or is not finite.
    """
    with torch.device("meta"):
        model = build(**asdict(config))
    model.to_empty(device=device)
    _fill_with_nan(model)
    torch.manual_seed(seed)
    model.init_weights()
    model.reset_buffers((config.img_size, config.img_size))
    _check_finite(model)
    return model


def wrap_blocks(model: Backbone, config: MemoryConfig) -> None:
    """Apply activation checkpointing and compilation to the residual blocks, in place.

    Compilation goes inside: compiling around a checkpoint gave NaN gradients of LayerNorm in
    bfloat16 on the CPU (torch 2.13 and 2.14).
    """
    stages = config.stages()
    for block in model.blocks():
        if not block.residual:
            continue
        forward = block.module.forward
        if config.compile:
            forward = torch.compile(forward, **COMPILE)
        if block.stage in stages:
            forward = partial(_recompute, forward)
        block.module.forward = forward


def synchronise_batch_norm(model: nn.Module) -> None:
    """Let every BatchNorm take its statistics over all processes, where there are several."""
    if dist.get_world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.process_group = dist.group.WORLD


def _recompute(forward: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
    call = partial(forward, **options)
    result: Tensor = checkpoint(call, *args, use_reentrant=False, context_fn=_contexts)
    return result


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), recomputing()


@torch.no_grad()
def _fill_with_nan(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def _check_finite(model: nn.Module) -> None:
    tensors = (*model.named_parameters(), *model.named_buffers())
    wrong = [name for name, tensor in tensors if not tensor.isfinite().all()]
    if wrong:
        raise RuntimeError(f"not finite after initialisation: {', '.join(wrong)}")
