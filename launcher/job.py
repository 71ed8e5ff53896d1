"""The driver of a Slurm job: `python -m launcher.job RECIPE [--SECTION.SETTING VALUE ...]`.

What a batch script of slurm/ becomes, on the job's first node. It makes or continues the run
folder, starts one worker per task by srun, hands signals on to them, and when they have ended
decides whether the job is done, stops, or is queued again. Invariant: what it decides follows from
files in the run folder and from Slurm's own account of the job, for srun hides how workers end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from trainer.config import RunConfig, UserError, override
from trainer.recipes import recipe

from . import container, preflight, rundir, slurm
from .local import python_environment
from .process import (
    BAD_NODE,
    BAD_NUMERICS,
    REQUEUE,
    STOPPED,
    USER_ERROR,
    Failure,
    born,
    expand_hosts,
    failure_file,
)
from .starts import End, Start, Starts, has_trained_to_the_end

T = TypeVar("T")
AGAIN = 1.0
"""Seconds between two signals: one that comes before the workers are ready for it is lost."""
CONTROLLER = 600.0
"""Seconds to wait for a controller that is restarted."""
ASKING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask for a stop."""
FINAL = (USER_ERROR, BAD_NUMERICS, STOPPED)
"""Exit codes after which another start would end in the same way."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What Slurm has given the job: its nodes in order, and how many tasks go on them together."""

    job: int
    restart: int
    nodes: tuple[str, ...]
    tasks: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Allocation:
        """Read the variables that sbatch sets.

        Raises:
            UserError: if this is no batch job.
        """
        try:
            nodes = tuple(expand_hosts(environment["SLURM_JOB_NODELIST"]))
            # SLURM_NTASKS is that of the first start, even if the job now has other nodes.
            per_node = environment.get("SLURM_NTASKS_PER_NODE")
            return cls(
                job=int(environment["SLURM_JOB_ID"]),
                restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
                nodes=nodes,
                tasks=len(nodes) * int(per_node) if per_node else int(environment["SLURM_NTASKS"]),
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                f"this is no Slurm job ({error}): submit a script of slurm/ by sbatch, or train "
                "on this machine by foveate pretrain"
            ) from None


def main() -> int:
    """Drive one start of a job's run and return its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)  # until they are noted, by the frozen driver
    try:
        return drive(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def drive(arguments: Sequence[str]) -> int:
    """Make or continue the run that the arguments describe, and see its workers to their end.

    Raises:
        UserError: if nothing could be started, or Slurm refuses to queue the job again.
    """
    config = _config(arguments)
    go_on_with_frozen_code(Path(config.run_dir) / "code")
    asked = note_signals()
    moments = [("job", born()), ("driver", time.time())]
    allocation = Allocation.from_environment(os.environ)
    config.check_world(allocation.tasks)
    run_dir = rundir.prepare(config)
    starts = Starts(run_dir)
    if starts.is_complete():
        print(f"{run_dir} is complete", flush=True)
        return 0
    start = starts.begin(
        job=allocation.job,
        restart=allocation.restart,
        nodes=allocation.nodes,
        processes=allocation.tasks,
    )
    moments += [("folder", time.time())]
    print(
        f"{config.recipe} in {run_dir}: {start.processes} processes on {', '.join(start.nodes)}, "
        f"from step {start.step}",
        flush=True,
    )
    if config.cluster.preflight and (bad := _bad_nodes(config, starts, start, asked)):
        return _avoid(starts, start, bad)
    moments += [("preflight", time.time())]
    status = Step(config, run_dir, start, asked=asked, moments=moments).run()
    return _conclude(starts, start, status, asked=asked)


def _config(arguments: Sequence[str]) -> RunConfig:
    if not arguments or arguments[0].startswith("-"):
        raise UserError("which recipe? python -m launcher.job RECIPE [--SECTION.SETTING VALUE ...]")
    name, *overrides = arguments
    return override(recipe(name), overrides)


def go_on_with_frozen_code(code: Path) -> None:
    """Become the driver that a run which has begun has frozen: the checkout may have moved on."""
    if (code / "launcher" / "job.py").is_file() and code.resolve() != rundir.CODE:
        command = [sys.executable, "-m", "launcher.job", *sys.argv[1:]]
        os.execve(sys.executable, command, python_environment(code))


def note_signals() -> list[signal.Signals]:
    """Let the signals that ask for a stop be noted in the list that is returned."""
    asked: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))

    for number in ASKING:
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    return asked


class Step:
    """The workers of one start, under srun. `asked` fills with signals that ask for their stop."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        start: Start,
        *,
        asked: Sequence[signal.Signals],
        moments: Sequence[tuple[str, float]],
    ) -> None:
        self.asked = asked
        self._job_id = start.job
        self._command = [
            *("srun", f"--nodes={len(start.nodes)}", f"--ntasks={start.processes}"),
            *("--kill-on-bad-exit=1", "--wait=60", "--export=ALL"),
            *worker_command(config, run_dir, image=os.environ.get("FOVEATE_CONTAINER", "")),
        ]
        self._environment = python_environment(run_dir / "code")
        moments = [*moments, ("srun", time.time())]
        self._environment["FOVEATE_STARTED"] = ",".join(f"{n}={t:.2f}" for n, t in moments)
        failure_file(run_dir).unlink(missing_ok=True)

    def run(self) -> int:
        """Start the workers, hand signals on until all have ended, and return srun's status."""
        if self.asked:
            return REQUEUE
        self._say_when_the_job_ends()
        process = subprocess.Popen(self._command, env=self._environment, stdin=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=AGAIN)
            if self.asked:
                with contextlib.suppress(UserError):  # the workers may have ended
                    slurm.send_signal(self._job_id, "USR1")

    def _say_when_the_job_ends(self) -> None:
        """Tell the workers what they have to be through with a last save by; new Slurms do it."""
        with contextlib.suppress(UserError):  # a run can do without
            job = slurm.job(self._job_id)
            if job is not None and job.seconds_left is not None:
                end = str(int(time.time()) + job.seconds_left)
                self._environment.setdefault("SLURM_JOB_END_TIME", end)


def worker_command(config: RunConfig, run_dir: Path, *, image: str) -> list[str]:
    """Return what srun runs in every task, in a container if one is named."""
    python = container.python(image, container.folders(config, run_dir))
    return [*python, "-m", "trainer", "--config", str(run_dir / "config.json")]


def _bad_nodes(
    config: RunConfig, starts: Starts, start: Start, asked: Sequence[signal.Signals]
) -> list[str]:
    """Return the nodes that fail their checks, none if the job is to stop: that ends checks too."""
    try:
        bad = preflight.check(starts.run_dir, config)
    except UserError as error:
        if not asked:
            starts.end(start, code=USER_ERROR, why=f"error: {error}")
            raise
    return [] if asked else bad


def _avoid(starts: Starts, start: Start, bad: Sequence[str]) -> int:
    """Queue the job again without nodes that failed their checks; return the exit code."""
    why = f"error: the checks of {', '.join(bad)} failed"
    end = starts.end(start, code=BAD_NODE, why=why, without=bad)
    print(why, file=sys.stderr, flush=True)
    return _queue_again(starts, start, end)


def _conclude(starts: Starts, start: Start, status: int, *, asked: Sequence[signal.Signals]) -> int:
    """Decide what follows, now that the workers of a start have ended; return the exit code."""
    if not starts.is_newest(start):
        print("a newer start of this job has taken over: this one leaves all to it", flush=True)
        return status
    failure = Failure.read(starts.run_dir)
    code, why = _cause(status, failure, starts.run_dir)
    print(why, file=sys.stderr if code else sys.stdout, flush=True)
    may_go_on = code != 0 and code not in FINAL
    if may_go_on and (signal.SIGTERM in asked or _is_being_ended(start.job)):
        print("the job is being ended from outside: if at all, Slurm queues it again", flush=True)
        return code
    bad = failure.node.split(",") if failure and failure.node and code == BAD_NODE else []
    end = starts.end(start, code=code, why=why, without=bad)
    return _queue_again(starts, start, end) if may_go_on else code


def _cause(status: int, failure: Failure | None, run_dir: Path) -> tuple[int, str]:
    """Return the exit code of the workers, and in words how they ended.

    srun returns 0 where a node is lost, too: only the metrics know that a run is complete.
    """
    if failure is not None:
        return failure.code, failure.said
    if status == 0 and has_trained_to_the_end(run_dir):
        return 0, "complete"
    if status == REQUEUE:
        return REQUEUE, "stopped: a signal came before the workers could take it"
    logs = run_dir / "logs"
    return 1, f"error: a worker was ended without a word (exit code {status}): see above and {logs}"


def _queue_again(starts: Starts, start: Start, end: End) -> int:
    """Queue the job again unless that is hopeless or forbidden; return the exit code."""
    if starts.has_failed_enough(end):
        print(
            f"error: the last starts of job {start.job} saved nothing beyond step {end.step}, so "
            f"it is not queued again: see {starts.run_dir / 'logs'}, then submit it again",
            file=sys.stderr,
        )
        return end.code
    if not _patiently(lambda: slurm.may_requeue(start.job)):
        print(
            f"job {start.job} may not be queued again: where no job of a chain follows, submit it "
            "again",
            flush=True,
        )
        return end.code
    avoiding = f", without {', '.join(end.without)}" if end.without else ""
    print(f"job {start.job} is queued again{avoiding}", flush=True)
    _patiently(lambda: slurm.requeue(start.job, without=end.without))
    return REQUEUE


def _is_being_ended(job_id: int) -> bool:
    """Return whether Slurm or a user is ending a job: it is cancelled, preempted or lost a node."""
    job = _patiently(lambda: slurm.job(job_id))
    return job is None or job.state != "RUNNING"


def _patiently(ask: Callable[[], T]) -> T:
    """Ask Slurm, again and again while its controller is being restarted."""
    deadline = time.monotonic() + CONTROLLER
    while True:
        try:
            return ask()
        except slurm.Unreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(10)


if __name__ == "__main__":
    sys.exit(main())
