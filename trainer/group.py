"""Joining the processes of a run: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from launcher.process import Process


def join(process: Process) -> torch.device:
    """Join the run's process group and return this process's device: its GPU, else the CPU.

    A process that has joined one already, a notebook's for one, stays in it.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(process.local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"tcp://{process.address}:{process.port}",
            rank=process.rank,
            world_size=process.world_size,
        )
    return torch.device("cuda", process.local_rank) if cuda else torch.device("cpu")


def gloo_group() -> dist.ProcessGroup:
    """Return a new gloo group of all ranks, for talk that must not meet the training's."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "a group of all ranks has this one in it"
    return group
