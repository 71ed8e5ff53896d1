"""The micro-batch of a run: the largest that fits in memory, found by trying before it starts.

How a step is split changes what it computes by rounding alone, so the answer may differ from start
to start; it is equal on all ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from models.base import Backbone

from .backends.wrap import build_model, wrap_blocks
from .config import RunConfig, UserError
from .group import gather
from .precision import autocast
from .task import Task

HEADROOM = 0.05  # of a GPU's memory, for the buffers of communication and for fragmentation


def fit_microbatch(config: RunConfig, device: torch.device, task: Task) -> RunConfig:
    """Return `config` with the smallest train.accumulate that fits, where that is asked for.

    Raises:
        UserError: if not even the smallest micro-batch fits.
    """
    if config.train.microbatch == "set":
        return config
    world_size = dist.get_world_size()
    found: int | None = 1  # a CPU knows no such limit
    if device.type == "cuda":
        found = try_out(config, device, task, world_size)
        torch.cuda.reset_peak_memory_stats(device)
    answers = gather(found)  # what else runs on a GPU may differ
    if None in answers:
        raise UserError(
            f"not one image group of {config.model.name} at {largest_side(config)} pixels fits in "
            "the GPU's memory, undivided: set train.accumulate and leave train.microbatch out, or "
            "use --memory.checkpointing full"
        )
    return replace(config, train=replace(config.train, accumulate=max(answers)))


def smallest_accumulate(
    config: RunConfig, world_size: int, fits: Callable[[int], bool]
) -> int | None:
    """Return the smallest number of micro-batches that divides a batch and whose images `fits`.

    `fits` is asked about the images of one process, of which micro-batches have fewer and fewer.
    None says that nothing fits.
    """
    groups = config.train.batch_size // config.data.mix_group
    for accumulate in range(1, groups // world_size + 1):
        if groups % accumulate == 0:
            largest_share = -(-groups // accumulate // world_size) * config.data.mix_group
            if fits(largest_share):
                return accumulate
    return None


def largest_side(config: RunConfig) -> int:
    """Return the side of the largest training images, in pixels."""
    return max([side for _, side in config.train.image_sides()] or [config.model.img_size])


def try_out(config: RunConfig, device: torch.device, task: Task, world_size: int) -> int | None:
    """Return what `smallest_accumulate` says of this process's GPU.

    Tried with a model of its own, undivided and not compiled, so that no rank waits for another.
    """
    model = build_model(config.model, seed=config.train.seed, device=device)
    model.reset_buffers((largest_side(config),) * 2)
    wrap_blocks(model, replace(config.memory, compile=False))
    reserved = reserved_bytes(config, model, world_size)
    reserved += int(HEADROOM * torch.cuda.mem_get_info(device)[1])

    def fits(images: int) -> bool:
        fitted = trial(config, model, task, images=images, reserved=reserved)
        _release(model)
        return fitted

    try:
        return smallest_accumulate(config, world_size, fits)
    finally:
        model.to_empty(device="meta")  # its wrapped blocks refer to themselves
        _release(model)


def trial(config: RunConfig, model: Backbone, task: Task, *, images: int, reserved: int) -> bool:
    """Return whether forward and backward over so many images fit beside `reserved` bytes."""
    device = model.device
    try:
        held = torch.empty(reserved, dtype=torch.uint8, device=device)
        inputs = torch.zeros(images, 3, *model.size, device=device)
        targets = torch.zeros(images, config.model.num_classes, device=device)
        noise = torch.zeros(model.num_blocks, 2, images, device=device)
        with autocast(device, config.train.precision):
            loss = task(model, inputs, targets, noise if config.model.drop_path > 0 else None)
        torch.autograd.backward(loss.total)
        del held
    except torch.OutOfMemoryError:
        return False
    return True


def reserved_bytes(config: RunConfig, model: Backbone, world_size: int) -> int:
    """Return what training holds beside weights, gradients and activations, in bytes.

    Two moments and the average, divided as the backend does, and ddp's buckets of gradients.
    """
    numbers = sum(parameter.numel() for parameter in model.parameters())
    copies = 2 + (config.train.ema_decay > 0)
    if config.backend.name == "ddp":
        return 4 * numbers * (copies + 1)
    return 4 * numbers * copies * config.backend.replicas // world_size


def _release(model: Backbone) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
