"""Hangs: each rank says how far it is, outside of the collectives, and who is stuck is named.

A rank that waits in a collective waits for another one, so the one to blame is the one that got
least far. A thread of each rank writes how far that is into a file, which no collective can block,
and looks at the others' files. Invariant: nothing here touches the device or a process group, so
that it works while those do not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from launcher.process import BAD_NODE, Failure, node_name

from .control import Control
from .manifest import write_atomically

_LOOKS = 8  # in the time after which a rank counts as stuck


class _Place(NamedTuple):
    """How far a rank has got, what it is doing there, and how often its thread has said so.

    `generation` is the start of the run that it is a rank of.
    """

    generation: int
    node: str
    moves: int
    doing: str
    beats: int


class Watchdog:
    """Ends this process by exit code 76 once it has not moved on for `seconds`; 0 never does.

    Call `at` wherever the training moves on. Until the first call of `started`, while models are
    compiled and machines connected, it waits `FIRST` times as long. The stacks of all threads go
    to each rank's log; who got least far, and on which node, is named in the run's failure.json.
    A start that a newer one has taken over from writes nothing.
    """

    FIRST = 3.0

    def __init__(self, control: Control, *, seconds: float) -> None:
        self.control = control
        self.run_dir = control.run_dir
        self.seconds = seconds
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._patience = self.FIRST * seconds
        self._node = node_name()
        self._moves = self._beats = 0
        self._doing = "starting"
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="foveate-watchdog", daemon=True)
        if seconds > 0:
            self._thread.start()

    def at(self, doing: str) -> None:
        """Note that this rank has got to the next place, and what it is doing there."""
        self._moves += 1
        self._doing = doing
        self._moved = time.monotonic()

    def started(self) -> None:
        """Note that the first step is done."""
        self._patience = self.seconds

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self.seconds > 0:
            self._thread.join()

    def _watch(self) -> None:
        while not self._wait():
            self._tell()
            if time.monotonic() - self._moved > self._patience:
                self._give_up()

    def _wait(self) -> bool:
        """Wait until the next look; return whether the training has ended."""
        begin = time.monotonic()
        ended = self._ended.wait(self.seconds / _LOOKS)
        if time.monotonic() - begin > self.seconds / 2:
            self._moved = time.monotonic()  # the whole process stood still: nobody is to blame
        return ended

    def _give_up(self) -> None:
        """Say who is stuck, and end this process."""
        print(f"no progress for {self._patience:.0f} seconds; stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        who, node = self._who()
        message = (
            f"no progress for {self._patience:.0f} seconds: {who}; the stacks of all ranks "
            f"are in {self.run_dir / 'logs'}; start again, without that machine if it happens again"
        )
        if not self.control.owns_folder():  # this rank may have stood still, or waited for one
            message = str(self.control.fenced())
        Failure(
            rank=self._rank,
            code=BAD_NODE,
            message=message,
            node=node,
            generation=self.control.generation,
        ).leave(self.run_dir)
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(BAD_NODE)

    def _who(self) -> tuple[str, str | None]:
        """Return who does not answer, or else who got least far, and the nodes they are on."""
        before = self._places()
        for _ in range(2):  # others get here a look later at most: their stacks are wanted too
            time.sleep(self.seconds / _LOOKS)
            self._tell()
        now = self._places()
        silent = [rank for rank in range(self._world_size) if now[rank] == before[rank]]
        if silent:
            return _names(silent, now) + " does not answer", _nodes(silent, now)
        moves = {rank: place.moves for rank, place in now.items() if place is not None}
        stuck = [rank for rank in moves if moves[rank] == min(moves.values())]
        if len(stuck) == self._world_size > 1:
            return "all ranks have got equally far: look at the network between them", None
        return _names(stuck, now) + " got stuck", _nodes(stuck, now)

    def _tell(self) -> None:
        self._beats += 1
        start = self.control.generation
        place = _Place(start, self._node, self._moves, self._doing, self._beats)
        if not self.control.owns_folder():
            return
        with contextlib.suppress(OSError):  # others see that this rank says nothing new
            (self.run_dir / "logs").mkdir(exist_ok=True)
            write_atomically(self._file(self._rank), json.dumps(place._asdict()))

    def _places(self) -> dict[int, _Place | None]:
        """Return where each rank said that it is; None if it never did."""
        return {rank: self._place(rank) for rank in range(self._world_size)}

    def _place(self, rank: int) -> _Place | None:
        try:
            place = _Place(**json.loads(self._file(rank).read_text()))
        except (OSError, TypeError):  # there is none, or one of another version
            return None
        return place if place.generation == self.control.generation else None

    def _file(self, rank: int) -> Path:
        return self.run_dir / "logs" / f"place_{rank:05d}.json"


def _names(ranks: list[int], places: Mapping[int, _Place | None]) -> str:
    return " and ".join(_name(rank, places[rank]) for rank in ranks)


def _name(rank: int, place: _Place | None) -> str:
    return f"rank {rank}" + ("" if place is None else f" on {place.node} ({place.doing})")


def _nodes(ranks: list[int], places: Mapping[int, _Place | None]) -> str | None:
    """Return the nodes of some ranks, joined by commas, as far as the ranks have named theirs."""
    known = [place.node for rank in ranks if (place := places[rank]) is not None]
    return ",".join(dict.fromkeys(known)) or None
