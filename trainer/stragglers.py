"""Stragglers: ranks whose own work takes longer than that of the others, by name.

All steps take as long as the slowest rank's, so whole steps tell nothing; what is timed is the
forward pass, in which a rank waits for others least (for gathered parameters under fsdp, for the
statistics of synchronised BatchNorm: there a straggler shows less). Invariant: the device is never
waited for; its times are read an interval later.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.process import node_name

from .group import gather
from .outliers import FEWEST, usual

_SHARE = 0.2  # of the median, that a rank may take longer


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank, its machine, its seconds for a forward pass, and the median over all ranks."""

    rank: int
    host: str
    seconds: float
    median: float


class Stragglers:
    """Times this rank's forward passes and compares them with the other ranks'.

    `group` is a gloo group over all ranks. All ranks must call `look` equally often.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        self._cuda = device.type == "cuda"
        self._group = group
        self._hosts = gather(node_name(), group)
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._before: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Time what is done inside, a forward pass."""
        if self._cuda:
            begin, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - start)

    def look(self) -> list[Straggler]:
        """Return who straggles in the passes since the last look (on GPUs, since that before)."""
        if self._cuda:
            self._seconds = [begin.elapsed_time(end) / 1e3 for begin, end in self._before]
            self._before, self._events = self._events, []
        own = statistics.median(self._seconds) if self._seconds else 0.0
        self._seconds = []
        found = [torch.zeros(1, dtype=torch.float64) for _ in self._hosts]
        dist.all_gather(found, torch.tensor([own], dtype=torch.float64), group=self._group)
        return outliers([seconds.item() for seconds in found], self._hosts)


def outliers(seconds: Sequence[float], hosts: Sequence[str]) -> list[Straggler]:
    """Return the ranks whose `seconds` stand out, by median and median absolute deviation."""
    if len(seconds) < FEWEST:
        return []
    median, distance = usual(seconds, share=_SHARE)
    return [
        Straggler(rank=rank, host=host, seconds=value, median=median)
        for rank, (value, host) in enumerate(zip(seconds, hosts, strict=True))
        if value > median + distance
    ]
