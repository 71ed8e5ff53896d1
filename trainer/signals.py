"""Signals: handlers set a flag, ranks agree on it, the loop acts between steps.

A scheduler may tell one rank and not the others, and at different moments; agreement makes all
ranks leave the loop after the same step. It costs no wait: the vote that a step reads was cast one
step before.
"""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from launcher.process import stopping_signals


class Signals:
    """Watches for the signals that ask a run to save and stop. `group` is a gloo group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.received: str | None = None
        self._since = math.inf
        self._vote = torch.zeros(1)
        self._work: dist.Work | None = None
        for number in stopping_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._since = min(self._since, time.time())  # more signals give no more time
        self.received = signal.Signals(number).name

    def agree(self) -> bool:
        """Return whether any rank had been told to stop when this was last called.

        Every rank must call it equally often; all get the same answer.
        """
        stop = False
        if self._work is not None:
            self._work.wait()
            stop = bool(self._vote.item() > 0)
        self._vote = torch.tensor([float(self.received is not None)])
        self._work = dist.all_reduce(
            self._vote, op=dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return stop

    def seconds_left(self, grace: float | None) -> float:
        """Return how long this process may go on: infinity where nobody says.

        It is killed `grace` seconds after the signal, or when its Slurm job ends.
        """
        end = float(os.environ.get("SLURM_JOB_END_TIME", math.inf))
        return min(end, self._since + (math.inf if grace is None else grace)) - time.time()

    def settle(self) -> None:
        """Finish the vote under way, so that the group may be closed or used otherwise."""
        if self._work is not None:
            self._work.wait()
            self._work = None
