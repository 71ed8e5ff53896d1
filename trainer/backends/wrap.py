"""From a model's name to a model that is ready to be sharded: the one place that wraps blocks.

Order: meta device -> materialise, NaN-filled so that a forgotten initialisation is loud -> weights
and buffers -> activation checkpointing or offload around compilation, block by block. Weights are
drawn before sharding, from the seed alone, so that every backend and world size starts from the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

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

# What selective checkpointing keeps instead of computing it again: what linear layers return. The
# models change attention's products and convolutions in place, so those cannot be kept.
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Around a forward pass, and around its repetition."""


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
    """Apply activation checkpointing or offload, and compilation, to the residual blocks, in place.

    Compilation goes inside: compiling around a checkpoint gave NaN gradients of LayerNorm in
    bfloat16 on the CPU (torch 2.13 and 2.14).
    """
    stages = config.stages()
    contexts = _selective_contexts if config.checkpointing == "selective" else _contexts
    for block in model.blocks():
        if not block.residual:
            continue
        forward = block.module.forward
        if config.compile:
            forward = torch.compile(forward, **COMPILE)
        if block.stage in stages:
            forward = partial(_recompute, forward, contexts)
        elif config.offload_activations:
            forward = partial(_offload, forward)
        block.module.forward = forward


def synchronise_batch_norm(model: nn.Module) -> None:
    """Let every BatchNorm take its statistics over all processes, where there are several."""
    if dist.get_world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.process_group = dist.group.WORLD


def _recompute(
    forward: Callable[..., Tensor],
    contexts: Callable[[], Contexts],
    *args: object,
    **options: object,
) -> Tensor:
    call = partial(forward, **options)
    result: Tensor = checkpoint(call, *args, use_reentrant=False, context_fn=contexts)
    return result


def _contexts() -> Contexts:
    return nullcontext(), recomputing()


def _selective_contexts() -> Contexts:
    first, again = create_selective_checkpoint_contexts(PRODUCTS)  # type: ignore[no-untyped-call]
    return first, _both(recomputing(), again)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _offload(forward: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
    """Run a block whose saved activations wait for the backward pass in the CPU's memory."""
    with saved_tensors_hooks(_to_cpu, _from_cpu):
        return forward(*args, **options)


def _to_cpu(saved: Tensor) -> tuple[torch.device, Tensor]:
    """Move an activation; weights stay, since their memory belongs to the backend."""
    if saved.is_leaf or (saved._base is not None and saved._base.is_leaf):
        return saved.device, saved
    pinned = saved.device.type == "cuda"
    held = torch.empty_like(saved, device="cpu", pin_memory=pinned)
    return saved.device, held.copy_(saved, non_blocking=pinned)


def _from_cpu(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, held = packed
    return held.to(device, non_blocking=True)


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
