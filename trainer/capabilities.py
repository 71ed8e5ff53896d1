"""What does not go together, with the reason and the remedy. Torch-free.

Settings that each mean something can still make no run together. All of that is known before a
process starts, and refused there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import RunConfig


def conflicts(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with a configuration on any number of processes."""
    backend, memory = config.backend, config.memory
    yield from _of_one_backend(config)
    yield from _of_a_disk(config)
    if backend.offload == "all" and backend.zero_stage in (1, 2):
        yield (
            f"backend.offload all needs weights that are divided, and {backend.name} keeps them "
            "whole: use backend.name zero3 or backend.offload optimizer"
        )
    if config.optim.name != "adamw" and backend.zero_stage:
        yield (
            f"optim.name {config.optim.name} needs parameters one by one, and {backend.name} lays "
            "them end to end: use optim.name adamw, or backend.name ddp or fsdp"
        )
    if config.guard.spike and config.guard.action == "skip" and backend.zero_stage:
        yield (
            f"guard.action skip needs an update that the device can leave out, and {backend.name} "
            "leaves none out: use guard.action rollback or abort"
        )
    if config.train.microbatch == "auto" and config.train.accumulate != 1:
        yield (
            f"train.accumulate is {config.train.accumulate}, which train.microbatch auto is to "
            "find: give one of the two"
        )
    if config.distill.weights is not None and config.distill.teacher is None:
        yield (
            f"distill.weights is {config.distill.weights} without a teacher: give --distill.teacher"
        )
    if memory.compile and memory.checkpointing == "selective":
        yield (
            "memory.checkpointing selective cannot see the linear layers in compiled blocks: "
            "use memory.checkpointing full, or leave memory.compile out"
        )
    if memory.offload_activations and memory.checkpointing in ("full", "selective", "1,2,3,4"):
        yield (
            f"memory.offload_activations has nothing to move with memory.checkpointing "
            f"{memory.checkpointing}, which recomputes every block: use one of the two, or name "
            "fewer stages"
        )


def _of_one_backend(config: RunConfig) -> Iterator[str]:
    backend = config.backend
    asked = {
        "replicas": backend.replicas != 1,
        "reshard": backend.reshard != "yes",
        "prefetch": backend.prefetch != 0,
    }
    for name in (name for name, is_asked in asked.items() if is_asked and backend.name != "fsdp"):
        yield (
            f"backend.{name} is {getattr(backend, name)}, which backend.name {backend.name} does "
            "not know: use backend.name fsdp, or leave it out"
        )
    if backend.offload != "none" and not backend.zero_stage:
        yield (
            f"backend.offload is {backend.offload}, which backend.name {backend.name} does not "
            "know: use backend.name zero1, zero2 or zero3, or leave it out"
        )


def _of_a_disk(config: RunConfig) -> Iterator[str]:
    backend = config.backend
    if backend.offload_dir is None:
        return
    if backend.zero_stage != 3:
        yield (
            f"backend.offload_dir is {backend.offload_dir}, and zero3 alone swaps to a disk: use "
            "backend.name zero3, or leave it out"
        )
    elif backend.offload == "none":
        yield (
            f"backend.offload_dir is {backend.offload_dir}, and backend.offload none moves nothing "
            "there: use backend.offload optimizer or all, or leave it out"
        )
    if not Path(backend.offload_dir).is_absolute():
        yield (
            f"backend.offload_dir is {backend.offload_dir}: give an absolute path, the same on "
            "each node"
        )


def world_conflicts(config: RunConfig, world_size: int) -> Iterator[str]:
    """Yield what is wrong with a valid configuration on so many processes."""
    replicas, among = config.backend.replicas, config.backend.reshard_after_forward()
    if world_size % replicas:
        yield (
            f"backend.replicas {replicas} does not divide the {world_size} processes: give a "
            "divisor of their number"
        )
        return
    shards = world_size // replicas
    if replicas > 1 and shards == 1:
        yield (
            f"backend.replicas {replicas} on {world_size} processes leaves nothing to divide: use "
            "backend.name ddp, or fewer replicas"
        )
    if not isinstance(among, bool) and (shards % among or among == shards):
        yield (
            f"backend.reshard {among} must divide the {shards} processes that share the weights, "
            "and be below their number: give another divisor, yes or no"
        )
