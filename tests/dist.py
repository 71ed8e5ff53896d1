"""Run a function on several real gloo processes and bring their answers back.

A wrong answer or an exception always reaches the test. Only one thing is forgiven: a process that
aborts while gloo shuts down, after it has handed over its result.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A rank raised or died: the message carries its traceback."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: object, timeout: float = 120.0
) -> list[Any]:
    """Return [fn(rank, world_size, *args) for every rank], each rank in a process of its own.

    `fn` must live at the top of a module and return tensors and plain values: dictionaries, lists,
    numbers and strings. Each process has a gloo group of all ranks, one thread, and torchrun's
    environment variables.

    Raises:
        RankError: for the first rank that raised or died.
        TimeoutError: if the ranks are not through after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="gloo-") as name:
        folder = Path(name)
        ranks = _start(fn, world_size, args, folder, timeout)
        try:
            _join(ranks, folder, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [_result(folder, rank) for rank in range(world_size)]


def prepared_context() -> ForkServerContext:
    """Return what starts processes as forks of one that did nothing but import.

    Importing takes seconds, of each process that has to do it.
    """
    context = multiprocessing.get_context("forkserver")
    modules = ["trainer.loop", "torch._dynamo", "torch._inductor.compile_fx", "deepspeed"]
    context.set_forkserver_preload(modules)
    return context


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    fn: Callable[..., Any], world_size: int, args: tuple[object, ...], folder: Path, timeout: float
) -> Sequence[BaseProcess]:
    context = prepared_context()
    environment = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = []
    for rank in range(world_size):
        place = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(
            target=_rank, args=(fn, rank, world_size, args, folder, timeout, place)
        )
        # OpenMP reads it once, as the first of all these processes imports torch.
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            process.start()
        ranks.append(process)
    return ranks


def _rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[object, ...],
    folder: Path,
    timeout: float,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    faulthandler.enable()  # a crash shows where it crashes
    faulthandler.dump_traceback_later(0.9 * timeout)  # a hang shows where it hangs
    gc.freeze()  # DeepSpeed collects garbage often: what was imported need not be looked at
    try:
        torch.set_num_threads(1)
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        torch.save(fn(rank, world_size, *args), folder / f"rank_{rank}.part")
    except BaseException:
        (folder / f"rank_{rank}.error").write_text(traceback.format_exc())
        # Leave without the group's clean-up, which can wait for the other ranks.
        os._exit(1)
    (folder / f"rank_{rank}.part").rename(folder / f"rank_{rank}.pt")
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # another rank may abort in its shutdown
            dist.barrier()
        dist.destroy_process_group()


def _join(ranks: Sequence[BaseProcess], folder: Path, deadline: float) -> None:
    running = dict(enumerate(ranks))
    while running:
        left = deadline - time.monotonic()
        if left <= 0 or not wait([process.sentinel for process in running.values()], left):
            raise TimeoutError(f"ranks {sorted(running)} are still running")
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[rank]
            aborted_late = process.exitcode == -signal.SIGABRT and _has_result(folder, rank)
            if process.exitcode != 0 and not aborted_late:
                raise _first_error(folder, rank, process.exitcode)


def _has_result(folder: Path, rank: int) -> bool:
    return (folder / f"rank_{rank}.pt").exists()


def _first_error(folder: Path, rank: int, exitcode: int) -> RankError:
    # When one rank fails, the others soon fail too, with nothing but a closed connection.
    errors = sorted(folder.glob("rank_*.error"), key=lambda path: path.stat().st_mtime_ns)
    if not errors:
        return RankError(f"rank {rank} ended with exit code {exitcode} and no traceback")
    return RankError(f"{errors[0].stem} failed:\n{errors[0].read_text()}")


def _result(folder: Path, rank: int) -> Any:
    return torch.load(folder / f"rank_{rank}.pt", weights_only=True)
