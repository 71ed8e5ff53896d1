"""Signals: handlers set a flag, ranks agree on it between steps, and while they wait for data.

A scheduler may tell one rank and not the others, and at different moments; agreement makes all
ranks leave before the same step. Invariant: no rank begins what all must finish together before
every rank has its data, for a rank whose data do not come would leave the others waiting in it.
"""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from data.base import Stopped
from launcher.process import stopping_signals


class Signals:
    """Watches for the signals that ask a run to save and stop. `group` is a gloo group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.received: str | None = None
        self._since = math.inf
        for number in stopping_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._since = min(self._since, time.time())  # more signals give no more time
        self.received = signal.Signals(number).name

    def agree(self) -> bool:
        """Return whether any rank has been told to stop, once every rank has its data or one has.

        All ranks call it equally often, when they have the data of what comes next; all get the
        same answer. One vote settles it unless somebody waits for data.
        """
        while True:
            stop, somebody_waits = self._vote(waits=False)
            if stop or not somebody_waits:
                return stop

    def while_waiting(self) -> None:
        """Vote while the data are not there; raises Stopped if any rank has been told to stop."""
        stop, _ = self._vote(waits=True)
        if stop:
            raise Stopped("a signal came while data were waited for")

    def seconds_left(self, grace: float | None) -> float:
        """Return how long this process may go on: infinity where nobody says.

        It is killed `grace` seconds after the signal, or when its Slurm job ends.
        """
        end = float(os.environ.get("SLURM_JOB_END_TIME", math.inf))
        return min(end, self._since + (math.inf if grace is None else grace)) - time.time()

    def _vote(self, *, waits: bool) -> tuple[bool, bool]:
        """Return whether any rank was told to stop, and whether any waits for data."""
        votes = torch.tensor([self.received is not None, waits], dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        stop, somebody_waits = votes.tolist()
        return stop > 0, somebody_waits > 0
