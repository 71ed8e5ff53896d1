"""What a job asks of Slurm: machines, processes, time.

Owns what of it can be checked without Slurm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import UserError

from . import slurm

WARNING = 300
"""Seconds before the time limit at which Slurm warns the driver: the time for the last save."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks of Slurm; None leaves an option to the site, and to the SBATCH_ variables.

    One process runs on each GPU unless `ntasks_per_node` says otherwise. `sbatch` holds further
    options as NAME=VALUE, or NAME alone.
    """

    nodes: int
    gpus_per_node: int
    ntasks_per_node: int | None
    cpus_per_task: int | None
    time: str | None
    partition: str | None
    account: str | None
    qos: str | None
    mem: str | None
    constraint: str | None
    sbatch: Sequence[str] = ()

    @property
    def num_tasks(self) -> int:
        """Processes on each node."""
        return self.gpus_per_node if self.ntasks_per_node is None else self.ntasks_per_node

    def check(self) -> None:
        """Raise UserError unless there are processes to start and time to do so."""
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_task", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is {value}: give at least {least}")
        if self.num_tasks < 1:
            raise UserError(
                f"{self.num_tasks} processes on a node: give --ntasks-per-node N, or GPUs"
            )
        if self.time is not None and _seconds(self.time) <= WARNING:
            raise UserError(
                f"--time is {self.time}: give more than the {WARNING // 60} minutes at its end, "
                "which are for the last save"
            )

    def options(self, num_workers: int) -> dict[str, str | None]:
        """Return sbatch's options by name for workers with so many decoding threads."""
        found: dict[str, str | None] = {
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.num_tasks),
            "cpus-per-task": str(self.cpus_per_task or num_workers),
        }
        if self.gpus_per_node:
            found["gpus-per-node"] = str(self.gpus_per_node)
        for name in ("time", "partition", "account", "qos", "mem", "constraint"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        return found


def _seconds(time: str) -> float:
    """Return the seconds of a time limit in one of sbatch's forms.

    Raises:
        UserError: if it has another form.
    """
    if time.lower() in ("infinite", "unlimited"):
        return math.inf
    found = slurm.seconds(time)
    if found is None:
        raise UserError(f"--time is {time}: give minutes, HOURS:MINUTES:SECONDS, DAYS-HOURS or so")
    return found
