"""RUN/logs/starts.jsonl: when a job started the run, how that ended, and when to stop trying.

A start writes a line as it begins and one as it ends; a start that something from outside ends, a
node that dies or a preemption without notice, gets no second line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from trainer import manifest
from trainer.config import UserError

from .jsonlines import objects, tail

FAILURES = 2
"""Starts of a job in a row that may end by themselves without a new checkpoint."""
EXCLUSIONS = 8
"""The same, where each cost the job a node: the next one may be better."""
LOSSES = 3
"""Starts of a job in a row that may be ended from outside without a new checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of the run: the job, how often that was requeued before, and where it began.

    `step` is the newest checkpoint's, 0 without one; `time` is in seconds since 1970.
    """

    job: int
    restart: int
    nodes: tuple[str, ...]
    processes: int
    step: int
    time: float


@dataclass(frozen=True, kw_only=True)
class End:
    """How a start ended: the workers' exit code, why in words, and the newest checkpoint then.

    `without` names the nodes that are to blame, on which the job does not go on.
    """

    job: int
    restart: int
    code: int
    why: str
    without: tuple[str, ...]
    step: int
    time: float


class Starts:
    """The starts of a run, oldest first; `ends` holds the end of those that saw it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file = starts_file(run_dir)

    def begin(self, *, job: int, restart: int, nodes: tuple[str, ...], processes: int) -> Start:
        """Note that a start begins and return it.

        Raises:
            UserError: if the job's last starts all were ended from outside, and for nothing.
        """
        step = newest_step(self.run_dir)
        lost = self._in_vain(job, step, has_ended=False)
        if len(lost) >= LOSSES:
            raise UserError(
                f"{len(lost)} starts of job {job} in a row were ended from outside before they "
                f"could save more than step {step}: lower --checkpoint.every, or let the job run "
                "where it is not preempted so soon; then submit it again"
            )
        start = Start(
            job=job, restart=restart, nodes=nodes, processes=processes, step=step, time=time.time()
        )
        self._append(asdict(start))
        return start

    def end(self, start: Start, *, code: int, why: str, without: Sequence[str] = ()) -> End:
        """Note how a start ended."""
        end = End(
            job=start.job,
            restart=start.restart,
            code=code,
            why=why,
            without=tuple(without),
            step=newest_step(self.run_dir),
            time=time.time(),
        )
        self._append(asdict(end))
        return end

    def is_newest(self, start: Start) -> bool:
        """Return whether no other start has begun since: Slurm may have taken this one for dead."""
        return self.read()[0][-1:] == [start]

    def has_failed_enough(self, end: End) -> bool:
        """Return whether the job is to give up, since starts of it fail and get nowhere."""
        failed = self._in_vain(end.job, end.step, has_ended=True)
        ends = self.read()[1]
        avoiding = [start for start in failed if ends[start.job, start.restart].without]
        return len(avoiding) >= EXCLUSIONS or len(failed) - len(avoiding) >= FAILURES

    def is_complete(self) -> bool:
        """Return whether the last start trained to the end, and what it saved is still there."""
        starts, ends = self.read()
        last = ends.get((starts[-1].job, starts[-1].restart)) if starts else None
        return last is not None and last.code == 0 and last.step == newest_step(self.run_dir) > 0

    def read(self) -> tuple[list[Start], dict[tuple[int, int], End]]:
        """Return the starts, oldest first, and the ends by job and restart."""
        try:
            lines = self._file.read_bytes()
        except FileNotFoundError:
            return [], {}
        starts: list[Start] = []
        ends: dict[tuple[int, int], End] = {}
        for values in objects(lines):  # one that a crash cut short counts as not written
            if "code" in values:
                values["without"] = tuple(values["without"])
                ends[values["job"], values["restart"]] = End(**values)
            else:
                values["nodes"] = tuple(values["nodes"])
                starts.append(Start(**values))
        return starts, ends

    def _in_vain(self, job: int, step: int, *, has_ended: bool) -> list[Start]:
        """Return the job's last starts that began no earlier than at `step`, of one kind."""
        starts, ends = self.read()
        last = takewhile(lambda start: start.job == job and start.step >= step, reversed(starts))
        return [start for start in last if ((start.job, start.restart) in ends) is has_ended]

    def _append(self, values: dict[str, Any]) -> None:
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"{self._file} cannot be written: {error.strerror}") from None


def starts_file(run_dir: Path) -> Path:
    """Return where a run's starts are listed."""
    return run_dir / "logs" / "starts.jsonl"


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint that was completed, 0 without one."""
    whole = [
        folder
        for folder in manifest.checkpoints(run_dir / "checkpoints")
        if (folder / manifest.MANIFEST).exists()
    ]
    return manifest.step_of(whole[-1]) if whole else 0


def has_trained_to_the_end(run_dir: Path) -> bool:
    """Return whether the last thing that a run's metrics say is that it is complete."""
    try:
        last = tail(run_dir / "metrics.jsonl").splitlines()[-1:]
    except OSError:
        return False
    return any(line.get("kind") == "end" for line in objects(b"".join(last)))
