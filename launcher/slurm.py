"""Slurm: what the launcher asks of it, and the one way in which any of its commands is run.

Commands are argument lists, never text for a shell, so that no name that a user chooses can become
a command. Slurm's own words reach the user when it refuses.
"""

from __future__ import annotations

import math
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import UserError

from .process import expand_hosts

PATIENCE = 60.0
"""Seconds after which a command that a busy controller does not answer has failed."""
_UNREACHABLE = re.compile("contact slurm controller|timed out|Connection refused", re.IGNORECASE)
_TIME = r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?"
"""Minutes, minutes:seconds, hours:minutes:seconds, or from days- on: hours, minutes, seconds."""
_SEPARATOR = "\x1f"
# Not --json: its form is another one in every release of Slurm.
_FORMAT = _SEPARATOR.join(["%A", "%K", "%j", "%T", "%r", "%N", "%x", "%L", "%o"])


class Unreachable(UserError):
    """Slurm's controller does not answer: it may be being restarted."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job in the words of `squeue`.

    `state` is one of RUNNING, PENDING, COMPLETING, COMPLETED, CANCELLED and so on; `command` the
    script with its arguments; `array_task` the number of a job in its array, None outside of one;
    `seconds_left` is None where no limit is set.
    """

    id: int
    array_task: int | None
    name: str
    state: str
    reason: str
    nodes: tuple[str, ...]
    excluded: tuple[str, ...]
    seconds_left: int | None
    command: str

    @classmethod
    def parse(cls, line: str) -> Job:
        """Read a line of squeue, in the columns that this module asks for."""
        job_id, task, name, state, reason, nodes, excluded, left, command = line.split(_SEPARATOR)
        return cls(
            id=int(job_id),
            array_task=int(task) if task.isdecimal() else None,
            name=name,
            state=state,
            reason=reason,
            nodes=_hosts(nodes),
            excluded=_hosts(excluded),
            seconds_left=seconds(left),
            command=command,
        )


def run(argv: Sequence[str]) -> str:
    """Run a command of Slurm and return what it prints.

    Raises:
        Unreachable: if the controller does not answer.
        UserError: if there is no such command here, or if it fails, in its own words.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise UserError(
            f"{argv[0]} is not on this machine: Slurm's commands are needed, as on a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(
            f"{argv[0]} did not answer for {PATIENCE:.0f} seconds: is Slurm's controller up?"
        ) from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        kind = Unreachable if _UNREACHABLE.search(said) else UserError
        raise kind(f"{argv[0]} failed: {said}")
    return done.stdout


def submit(arguments: Sequence[str]) -> int:
    """Submit a batch job by `sbatch ARGUMENTS` (options, script, its arguments); return its id."""
    said = run(["sbatch", "--parsable", *arguments]).strip().splitlines()[-1]
    return int(said.split(";")[0])  # a cluster's name may follow


def job(job_id: int) -> Job | None:
    """Return a job that Slurm still knows of, or None."""
    return next((found for found in queue(job_ids=[job_id]) if found.id == job_id), None)


def queue(*, job_ids: Sequence[int] = ()) -> list[Job]:
    """Return this user's jobs that are queued or running, or the given ones in any state."""
    which = ["--me"]
    if job_ids:
        which = ["--states=all", f"--jobs={','.join(map(str, job_ids))}"]
    try:
        lines = run(["squeue", "--noheader", "--array", f"--format={_FORMAT}", *which]).splitlines()
    except UserError as error:
        if job_ids and "Invalid job id" in str(error):  # ended long ago
            return []
        raise
    return [Job.parse(line) for line in lines]


def may_requeue(job_id: int) -> bool:
    """Return whether a job may be queued again, which --no-requeue or a site can forbid."""
    return run(["squeue", "--noheader", f"--jobs={job_id}", "--Format=Requeue"]).strip() != "0"


def requeue(job_id: int, *, without: Sequence[str] = ()) -> None:
    """Stop a running batch job and queue it again, by the same id, to run on other nodes.

    Slurm ends the job's processes, the caller with them if it is one.

    Raises:
        UserError: if Slurm refuses.
    """
    before = job(job_id)
    excluded = dict.fromkeys([*(before.excluded if before else ()), *without])
    # Slurm's TERM would reach these commands, too, between the one and the other.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        run(["scontrol", "requeue", str(job_id)])
        if without:  # Slurm takes this of pending jobs alone
            run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(excluded)}"])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def send_signal(job_id: int, name: str) -> None:
    """Send a signal to all processes of a job's steps, but not to its batch script."""
    run(["scancel", f"--signal={name}", str(job_id)])


def cancel(job_id: int) -> None:
    """Cancel a job: its processes get TERM, and KILL after what the site calls KillWait."""
    run(["scancel", str(job_id)])


def _hosts(nodelist: str) -> tuple[str, ...]:
    return tuple(expand_hosts(nodelist)) if nodelist not in ("", "(null)", "n/a") else ()


def seconds(time: str) -> int | None:
    """Return the seconds of a time as sbatch takes and squeue prints it, None of other words."""
    found = re.fullmatch(_TIME, time)
    if found is None:
        return None
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (60, 1) if days is None and len(numbers) < 3 else (3600, 60, 1)
    return 86_400 * int(days or 0) + sum(map(math.prod, zip(numbers, units, strict=False)))
