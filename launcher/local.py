"""Run a worker command on this machine: N processes under torchrun, or a single one directly.

The exit code is the workers' own, which torchrun hides: the first worker that fails leaves it in
the run folder. Workers are in sessions of their own, so a Ctrl-C reaches them through `Workers`
alone, once, and they save before they stop.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from trainer import manifest

from .process import Failure, failure_file, stopping_signals

_ENDED_BY_SIGNAL = re.compile(r"rank +: ([0-9]+) \(local_rank: [0-9]+\)\s+exitcode +: -([0-9]+)")
"""How torchrun reports a worker that a signal ended."""
_FENCED = re.compile(r"^error: .* this is start ([0-9]+), .*$", re.MULTILINE)
"""What the workers say, and leave no file about, once a newer start has taken the folder over."""
_FULL = 2**16
"""Bytes left on a disk that is full for all that is worth writing."""


def launch(
    run_dir: Path,
    *,
    num_processes: int,
    worker: Sequence[str] | None = None,
    code: Path | None = None,
) -> int:
    """Run workers to their end and return their exit code; see `Workers`."""
    with Workers(run_dir, num_processes=num_processes, worker=worker, code=code) as workers:
        while workers.running(seconds=60.0):
            pass
        return workers.exit_code()


class Workers:
    """The running workers of a run folder; leaving the context kills those that still run.

    Each is `python WORKER` with the packages in `code` first on its path; by default they train the
    folder's configuration by its own code.
    Rank 0 prints to this process's stdout. Every rank's log is RUN/logs/rank_00000.log and so on,
    and what torchrun itself has to say is in RUN/logs/launcher.log. `asked` lists the signals that
    have asked for a stop.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_processes: int,
        worker: Sequence[str] | None = None,
        code: Path | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.num_processes = num_processes
        self.worker = worker or ["-m", "trainer", "--config", str(run_dir / "config.json")]
        self.code = code or run_dir / "code"
        self.asked: list[signal.Signals] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._log_begin = 0
        self._starts_before = 0

    def __enter__(self) -> Workers:
        self._log().parent.mkdir(parents=True, exist_ok=True)
        failure_file(self.run_dir).unlink(missing_ok=True)
        self._starts_before = manifest.newest_generation(self.run_dir / "checkpoints")
        self._handlers = {n: signal.signal(n, self._forward) for n in stopping_signals()}
        with self._log().open("ab") as log:
            self._log_begin = log.tell()
            self._process = subprocess.Popen(
                worker_command(self.worker, num_processes=self.num_processes),
                env=worker_environment(self.code, num_processes=self.num_processes),
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        if self.asked:  # while the process was being made
            self.kill()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def running(self, *, seconds: float) -> bool:
        """Wait up to `seconds` for the workers to end; return whether they still run."""
        assert self._process is not None, "enter the context first"
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def kill(self) -> None:
        """End every process of the run by SIGKILL, as a crash would, and wait for their end."""
        if self._process is not None and self._process.poll() is None:
            tree = self._tree()
            for process in tree:
                _send(process, signal.SIGKILL)
            self._process.wait()
            deadline = time.monotonic() + 10  # a process that the kernel holds cannot be waited for
            while not all(map(is_gone, tree)) and time.monotonic() < deadline:
                time.sleep(0.01)

    def exit_code(self) -> int:
        """Say on stderr why workers that ended did not succeed, and return their exit code."""
        assert self._process is not None, "enter the context first"
        status = self._process.wait()
        if status == 0:
            return 0
        code, message = self._cause(status, Failure.read(self.run_dir))
        print(message, file=sys.stderr)
        return code

    def _cause(self, status: int, failure: Failure | None) -> tuple[int, str]:
        """Return the exit code of workers that did not succeed, and why they did not.

        A rank that is killed says nothing, and those that waited for it fail with a traceback.
        """
        logs, killed = self.run_dir / "logs", self._killed(status)
        for words in _FENCED.finditer(self._said()):
            if int(words[1]) > self._starts_before:  # an earlier start may have the same log open
                return 2, words[0]
        if failure is not None and failure.code != 1:
            return failure.code, failure.said
        if failure is None and self.asked:
            said = f"stopped: {self.asked[0].name} came before the run could be saved"
            return 128 + self.asked[0], said
        if killed is not None:
            rank, number = killed
            why = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
            return 128 + number, f"error: rank {rank} was ended by {number.name}{why}: see {logs}"
        if failure is not None:
            where = logs / f"rank_{failure.rank:05d}.log"
            return 1, f"{failure.message}\nrank {failure.rank} failed: see {where}"
        if shutil.disk_usage(self.run_dir).free < _FULL:
            return 2, f"error: the disk of {self.run_dir} is full: make room and start again"
        code = 128 - status if status < 0 else status
        said = f"error: the workers died without a report (exit code {code}): see {logs}"
        return code, "\n    ".join([said, *self._said().splitlines()[-20:]])

    def _killed(self, status: int) -> tuple[int, signal.Signals] | None:
        """Return a rank that a signal ended, and the signal, but for torchrun's own SIGTERM."""
        ended = [
            (int(rank), int(number)) for rank, number in _ENDED_BY_SIGNAL.findall(self._said())
        ]
        if status < 0 and self.num_processes == 1:
            ended = [(0, -status)]
        return next(((r, signal.Signals(n)) for r, n in ended if n != signal.SIGTERM), None)

    def _said(self) -> str:
        """Return what torchrun had to say since this start."""
        with self._log().open("rb") as log:
            log.seek(self._log_begin)
            return log.read().decode(errors="replace")

    def _log(self) -> Path:
        return self.run_dir / "logs" / "launcher.log"

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the workers, past torchrun, which would give them 30 seconds."""
        self.asked.append(signal.Signals(number))
        if number == signal.SIGINT and len(self.asked) > 1:
            self.kill()
        elif self._process is not None:
            for process in self._workers():
                _send(process, number)
            print("\nstopping: the workers save first (Ctrl-C now kills them)", file=sys.stderr)

    def _workers(self) -> list[psutil.Process]:
        """Return the worker processes, or torchrun while it has started none."""
        tree = self._tree()
        return tree[:1] if self.num_processes == 1 else tree[1:] or tree

    def _tree(self) -> list[psutil.Process]:
        """Return the process that was started and its children: torchrun, then the workers."""
        assert self._process is not None, "enter the context first"
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children()]
        except psutil.NoSuchProcess:
            return []


def is_gone(process: psutil.Process) -> bool:
    """Return whether a process runs no more, even if nobody has collected its exit code yet."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have been faster
        process.send_signal(number)


def worker_command(worker: Sequence[str], *, num_processes: int) -> list[str]:
    """Return the command that runs workers, each `python WORKER`, on this machine."""
    if num_processes == 1:
        return [sys.executable, *worker]
    # Loopback addresses and a port chosen by the store itself: a machine whose host name does not
    # resolve cannot stall the start, and two runs cannot meet.
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--max-restarts", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", str(num_processes), *worker),
    ]


def worker_environment(code: Path, *, num_processes: int) -> dict[str, str]:
    """Return the environment of workers that run `code`, sharing this machine's cores fairly."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": str(max(1, cores // num_processes))}
    return {**threads, **python_environment(code)}


def python_environment(code: Path) -> dict[str, str]:
    """Return this process's environment with the packages in `code` first on the import path.

    PYTHONSAFEPATH keeps the current folder out: a data.py of the user's must not win.
    """
    paths = [str(code.resolve()), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def num_gpus() -> int:
    """Return how many GPUs this process may use, without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
