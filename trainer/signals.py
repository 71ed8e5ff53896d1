"""Signals: what asks a run to stop or save, and how all ranks learn of it at the same step.

A scheduler may tell one rank and not the others, and at different moments; the run's folder is
looked at by rank 0 alone. Agreement makes all ranks leave, or save, before the same step.
Invariant: no rank begins what all must finish together before every rank has its data, for a rank
whose data do not come would leave the others waiting in it.
"""

from __future__ import annotations

import math
import os
import signal
import time
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist

from data.base import Stopped
from launcher.process import stopping_signals

from .control import Control


class Stop(IntEnum):
    """Why a run leaves before its last step; of several reasons, the last one listed counts."""

    NONE = 0
    SIGNAL = 1
    FILE = 2
    STALE = 3


class Signals:
    """Watches for what asks a run to save or stop. `group` is a gloo group.

    `stop` and `save` are what all ranks have agreed on: why to leave, and whether a checkpoint is
    asked for.
    """

    def __init__(self, group: dist.ProcessGroup, control: Control) -> None:
        self.group = group
        self.control = control
        self.received: str | None = None
        self.stop = Stop.NONE
        self.save = False
        self._since = math.inf
        for number in stopping_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._since = min(self._since, time.time())  # more signals give no more time
        self.received = signal.Signals(number).name

    def agree(self) -> bool:
        """Return whether the run is to stop, once every rank has its data or it is.

        All ranks call it equally often, when they have the data of what comes next; all get the
        same answer. One vote settles it unless somebody waits for data.
        """
        while True:
            somebody_waits = self._vote(waits=False)
            if self.stop or not somebody_waits:
                return self.stop is not Stop.NONE

    def while_waiting(self) -> None:
        """Vote while the data are not there; raises Stopped if the run is to stop."""
        self._vote(waits=True)
        if self.stop:
            raise Stopped("the run was asked to stop while data were waited for")

    def saved(self) -> None:
        """Note that the checkpoint which was asked for is whole; all ranks do so together."""
        self.save = False
        if self.group.rank() == 0:
            self.control.saved()

    def seconds_left(self, grace: float | None) -> float:
        """Return how long this process may go on: infinity where nobody says.

        It is killed `grace` seconds after the signal, or when its Slurm job ends.
        """
        end = float(os.environ.get("SLURM_JOB_END_TIME", math.inf))
        return min(end, self._since + (math.inf if grace is None else grace)) - time.time()

    def _vote(self, *, waits: bool) -> bool:
        """Agree on `stop` and `save`; return whether any rank waits for data."""
        if self.group.rank() == 0:
            self.control.look()
        votes = torch.tensor([self._asked(), self.control.save, waits], dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        stop, save, somebody_waits = map(int, votes.tolist())
        self.stop, self.save = Stop(stop), save > 0
        return somebody_waits > 0

    def _asked(self) -> Stop:
        """Why this rank thinks that the run is to stop."""
        if self.control.stale:
            return Stop.STALE
        if self.control.stop:
            return Stop.FILE
        return Stop.NONE if self.received is None else Stop.SIGNAL
