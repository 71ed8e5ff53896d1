"""Joining the processes of a run: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.process import Process

from .config import UserError


def join(process: Process, run_dir: Path | None = None) -> torch.device:
    """Join the run's process group and return this process's device: its GPU, else the CPU.

    Without a run folder no collectives are recorded. A process that has joined one already, a
    notebook's for one, stays in it.

    Raises:
        UserError: if there is no GPU left for it.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", gpu_index(process, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if run_dir is not None:
            record_collectives(run_dir)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"tcp://{process.address}:{process.port}",
            rank=process.rank,
            world_size=process.world_size,
        )
    return device


def record_collectives(run_dir: Path) -> None:
    """Let NCCL's flight recorder write RUN/logs/collectives_RANK where a collective times out.

    What the environment says wins. `torchfrtrace` of torch reads the files.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run_dir / "logs" / "collectives_"))


def gpu_index(process: Process, num_gpus: int) -> int:
    """Return which of the GPUs that a process sees is its own.

    Where Slurm gives every task a GPU of its own (`--gpus-per-task 1`), each sees that one alone.

    Raises:
        UserError: if more processes than GPUs were started on this machine.
    """
    if process.kind == "slurm" and num_gpus == 1:
        return 0
    if process.local_rank >= num_gpus:
        raise UserError(
            f"process {process.local_rank} of this machine has no GPU: it sees {num_gpus}; start "
            f"{num_gpus} per machine, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return process.local_rank


def gloo_group() -> dist.ProcessGroup:
    """Return a new gloo group of all ranks, for talk that must not meet the training's."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "a group of all ranks has this one in it"
    return group


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values that all ranks of `group`, or of the run, gave, by rank.

    They are plain, as in JSON.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
