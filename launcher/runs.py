"""The runs below a folder and how they stand: `foveate runs`.

All of it is read from the run folders, a few kilobytes of each, and from Slurm's queue where there
is one. Invariant: nothing here waits for a run or writes to one, and a folder that is damaged is
a line like any other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer import manifest
from trainer.config import UserError

from . import slurm
from .jsonlines import objects, tail
from .process import Failure
from .starts import starts_file
from .table import duration, table

SCRIPT = "job.sbatch"
"""The job script in the folder of a run that was submitted."""
SWEEP_SCRIPT = ".sweep.sbatch"
"""What the array script of a sweep adds to the name that its run folders share."""
_PATIENCE = 900.0
"""Seconds of silence that say nothing yet, where `guard.hang_seconds` does not say."""
_HEAD = 2**12
"""Bytes of metrics.jsonl that hold its first line."""

State = Literal[
    "running", "queued", "requeued", "stopped", "complete", "stale", "not started", "damaged"
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run stands; None where that is not known, or does not apply.

    `why` belongs to the state: what stopped the run, what its job waits for, since when it is
    silent. `images_per_second` is of the last log interval and over all processes; `seconds_left`
    leaves evaluations out. `best_top1` is in percent, `checkpoint_age` in seconds.
    """

    folder: str
    state: State
    why: str | None = None
    step: int | None = None
    steps: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    best_top1: float | None = None
    job: int | None = None


def show(folder: Path, *, as_json: bool) -> int:
    """Print the runs below `folder`, as a table or as JSON.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that holds run folders, such as runs")
    queue = Queue(_queued())
    runs = [look(path, queue.of(path)) for path in run_folders(folder)]
    if as_json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], indent=2))
    elif not runs:
        print(f"no runs below {folder}")
    else:
        heading = ("run", "step", "images/s", "left", "checkpoint", "top-1", "job", "state")
        print(table([heading, *map(_row, runs)], left=(0, 7)))
    return 0


def run_folders(folder: Path) -> Iterator[Path]:
    """Yield the run folders in and below `folder` by name; what is in them is not searched."""
    seen: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link that leads back up
            folders.clear()
        elif {"config.json", "metrics.jsonl"} & set(files):
            yield Path(path)
            folders.clear()
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _queued() -> list[slurm.Job]:
    """Return the jobs in Slurm's queue, none where there is no Slurm or it does not answer."""
    if shutil.which("squeue") is None:
        return []
    try:
        return slurm.queue()
    except UserError as error:  # the folders know most of it
        print(f"note: {error}", file=sys.stderr)
        return []


class Queue:
    """Jobs by the run that they belong to."""

    def __init__(self, jobs: Sequence[slurm.Job]) -> None:
        self._by_id = {job.id: job for job in jobs}
        self._by_run: dict[Path, list[slurm.Job]] = {}
        for job in jobs:
            if (run_dir := _run_of(job)) is not None:
                self._by_run.setdefault(run_dir.resolve(), []).append(job)

    def of(self, run_dir: Path) -> list[slurm.Job]:
        """Return the jobs whose script is the run's, running ones first, or its last start's."""
        submitted = self._by_run.get(run_dir.resolve(), [])
        started = self._by_id.get(_last_job(run_dir) or 0)
        known = submitted or ([started] if started is not None else [])
        return sorted(known, key=_waits)


def _waits(job: slurm.Job) -> bool:
    return job.state == "PENDING"


def _run_of(job: slurm.Job) -> Path | None:
    """Return the run folder whose script a job is, which the script's place tells."""
    script = Path(job.command)
    if script.name == SCRIPT:
        return script.parent
    if script.name.endswith(SWEEP_SCRIPT) and job.array_task is not None:
        return script.with_name(f"{script.name.removesuffix(SWEEP_SCRIPT)}-{job.array_task}")
    return None


def _last_job(run_dir: Path) -> int | None:
    """Return the job that the last line of RUN/logs/starts.jsonl names."""
    job = _number(_last_start(run_dir), "job")
    return None if job is None else int(job)


def _last_start(run_dir: Path) -> dict[str, Any]:
    """Return the last line of RUN/logs/starts.jsonl: how a job began or ended; or nothing."""
    try:
        return next(reversed(list(objects(tail(starts_file(run_dir))))), {})
    except OSError:
        return {}


def look(run_dir: Path, jobs: Sequence[slurm.Job] = ()) -> Run:
    """Return how the run in `run_dir` stands, given its jobs in the queue."""
    try:
        return _look(run_dir, jobs)
    except (OSError, ValueError) as error:
        return Run(folder=str(run_dir), state="damaged", why=str(error))


def _look(run_dir: Path, jobs: Sequence[slurm.Job]) -> Run:
    config = _config(run_dir)
    events = _events(run_dir / "metrics.jsonl")
    checkpoint = _newest_checkpoint(run_dir)
    state, why = _state(run_dir, config, events, jobs)
    step = events[-1]["step"] if events else None
    steps = _last(events, "start", "steps")
    rate = _last(events, "train", "images_per_second")
    batch_size = _number(config.get("train"), "batch_size")
    left = None
    if state == "running" and steps and step is not None and rate and batch_size:
        left = (steps - step) * batch_size / rate
    run = Run(
        folder=str(run_dir),
        state=state,
        why=why,
        step=step,
        steps=None if steps is None else int(steps),
        images_per_second=rate,
        seconds_left=left,
        best_top1=_best(events, checkpoint),
        job=jobs[0].id if jobs else None,
    )
    if checkpoint is None:
        return run
    folder = manifest.step_folder(run_dir / "checkpoints", checkpoint.step)
    return replace(run, checkpoint_step=checkpoint.step, checkpoint_age=_age(folder))


def _state(
    run_dir: Path,
    config: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    jobs: Sequence[slurm.Job],
) -> tuple[State, str | None]:
    """Return the state of a run, and why it is in it."""
    course = [event["kind"] for event in events if event["kind"] in ("start", "stop", "end")]
    if course[-1:] == ["end"]:
        return "complete", None
    failure, signs, last = Failure.read(run_dir), _signs(run_dir), _last_start(run_dir)
    silence = min(signs.values(), default=None)
    if jobs and _waits(jobs[0]):
        reason = None if jobs[0].reason == "None" else jobs[0].reason
        return "requeued" if last.get("job") == jobs[0].id else "queued", reason
    if not jobs and "why" in last and signs.get(starts_file(run_dir)) == silence:
        return "stopped", _last_line(str(last["why"]))
    if not jobs and failure is not None:
        return "stopped", _last_line(failure.message)
    if not jobs and course[-1:] == ["stop"]:
        return "stopped", "by a signal"
    if not jobs and silence is None:
        return "not started", None
    if silence is not None and silence > _patience(config):
        return "stale", f"nothing heard for {duration(silence)}"
    return "running", None


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _signs(run_dir: Path) -> dict[Path, float]:
    """Return the signs of life, of the job, rank 0 and its watchdog, and how many seconds old."""
    logs = run_dir / "logs"
    signs = (run_dir / "metrics.jsonl", logs / "rank_00000.log", logs / "place_00000.json")
    ages = {sign: _age(sign) for sign in (*signs, starts_file(run_dir))}
    return {sign: age for sign, age in ages.items() if age is not None}


def _patience(config: Mapping[str, Any]) -> float:
    """Return the seconds after which a run that lives would have ended itself as stuck."""
    return _number(config.get("guard"), "hang_seconds") or _PATIENCE


def _age(path: Path) -> float | None:
    """Return the seconds since a file or folder was written, or None if there is none."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None


def _config(run_dir: Path) -> dict[str, Any]:
    """Read a run's config.json as it is: it may be of another version.

    Raises:
        ValueError: if it is missing or no JSON object.
    """
    path = run_dir / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is no configuration: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no configuration")
    return found


def _events(path: Path) -> list[dict[str, Any]]:
    """Return the first and the last lines of metrics.jsonl, without those that are damaged.

    How long the run is stands in the first, and in that of every later start.
    """
    try:
        lines = [*objects(_head(path)), *objects(tail(path))]
    except FileNotFoundError:
        return []
    return [
        line
        for line in lines
        if isinstance(line.get("kind"), str) and type(line.get("step")) is int
    ]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _number(values: object, name: str) -> float | None:
    """Return a number of a JSON object, or None if it has none of that name."""
    found = values.get(name) if isinstance(values, dict) else None
    return found if isinstance(found, int | float) and math.isfinite(found) else None


def _last(events: Sequence[Mapping[str, Any]], kind: str, name: str) -> float | None:
    """Return a number of the last event of a kind."""
    return next((_number(event, name) for event in reversed(events) if event["kind"] == kind), None)


def _newest_checkpoint(run_dir: Path) -> manifest.Manifest | None:
    """Return the newest manifest that can be read; what it lists is not looked at."""
    for folder in reversed(manifest.checkpoints(run_dir / "checkpoints")):
        try:
            return manifest.read(folder)
        except ValueError:
            continue
    return None


def _best(
    events: Sequence[Mapping[str, Any]], checkpoint: manifest.Manifest | None
) -> float | None:
    """Return the best top-1 so far: the checkpoint knows it, but for evaluations since."""
    found = [
        _number(event, "ema_top1" if "ema_top1" in event else "top1")
        for event in events
        if event["kind"] == "eval"
    ]
    state = checkpoint.record.get("state") if checkpoint is not None else None
    if isinstance(state, dict) and state.get("best_step") is not None:
        found.append(_number(state, "best"))
    return max((top1 for top1 in found if top1 is not None), default=None)


def _row(run: Run) -> tuple[str, ...]:
    def cell(value: object, text: str) -> str:
        return "-" if value is None else text

    return (
        run.folder,
        cell(run.step, f"{run.step}/{run.steps or '?'}"),
        cell(run.images_per_second, f"{run.images_per_second or 0:.4g}"),
        cell(run.seconds_left, duration(run.seconds_left or 0)),
        cell(run.checkpoint_step, f"{run.checkpoint_step} ({duration(run.checkpoint_age or 0)})"),
        cell(run.best_top1, f"{run.best_top1 or 0:.2f}"),
        cell(run.job, str(run.job)),
        run.state + (f": {run.why}" if run.why else ""),
    )
