"""Run a worker command on this machine: N processes under torchrun, or a single one directly.

The exit code is the workers' own, which torchrun hides: the first worker that fails leaves it in
the run folder. Workers are in sessions of their own, so a Ctrl-C reaches them through `Workers`
alone, once, and they save before they stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from .process import REQUEUE, Failure, failure_file, stopping_signals


def launch(run_dir: Path, *, num_processes: int) -> int:
    """Run the workers of a run folder to their end and return their exit code."""
    with Workers(run_dir, num_processes=num_processes) as workers:
        while workers.running(seconds=60.0):
            pass
        return workers.exit_code()


class Workers:
    """The running workers of a run folder; leaving the context kills those that still run.

    Rank 0 prints to this process's stdout. Every rank's log is RUN/logs/rank_00000.log and so on,
    and what torchrun itself has to say is in RUN/logs/launcher.log.
    """

    def __init__(self, run_dir: Path, *, num_processes: int) -> None:
        self.run_dir = run_dir
        self.num_processes = num_processes
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._asked: list[signal.Signals] = []

    def __enter__(self) -> Workers:
        self._log().parent.mkdir(exist_ok=True)
        failure_file(self.run_dir).unlink(missing_ok=True)
        self._handlers = {n: signal.signal(n, self._forward) for n in stopping_signals()}
        with self._log().open("ab") as log:
            self._process = subprocess.Popen(
                worker_command(self.run_dir, num_processes=self.num_processes),
                env=worker_environment(self.run_dir / "code", num_processes=self.num_processes),
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        if self._asked:  # while the process was being made
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
        status, failure = self._process.wait(), Failure.read(self.run_dir)
        if status == 0:
            return 0
        if failure is None:
            return self._unexplained(status)
        if failure.code == REQUEUE:
            print(f"stopped: {failure.message}", file=sys.stderr)
        elif failure.code == 1:
            where = self.run_dir / "logs" / f"rank_{failure.rank:05d}.log"
            print(f"{failure.message}\nrank {failure.rank} failed: see {where}", file=sys.stderr)
        else:
            print(f"error: {failure.message}", file=sys.stderr)
        return failure.code

    def _unexplained(self, status: int) -> int:
        """Report workers that died without a word, as a kill or a crash in C code leaves them."""
        if self._asked:
            name = self._asked[0].name
            print(f"stopped: {name} came before the run could be saved", file=sys.stderr)
            return 128 + self._asked[0]
        code = 128 - status if status < 0 else status
        print(
            f"error: the workers died without a report (exit code {code}): see "
            f"{self.run_dir / 'logs'}",
            *self._log().read_text(errors="replace").splitlines()[-20:],
            sep="\n    ",
            file=sys.stderr,
        )
        return code

    def _log(self) -> Path:
        return self.run_dir / "logs" / "launcher.log"

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the workers, past torchrun, which would give them 30 seconds."""
        self._asked.append(signal.Signals(number))
        if number == signal.SIGINT and len(self._asked) > 1:
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


def worker_command(run_dir: Path, *, num_processes: int) -> list[str]:
    """Return the command that runs the workers of a run folder on this machine."""
    worker = ["-m", "trainer", "--config", str(run_dir / "config.json")]
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
