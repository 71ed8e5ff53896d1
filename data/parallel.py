"""Work over many processes of this machine, which end with the one that started them.

A fork server starts them: it has imported what they need once, and no thread of this process is
cut in two. In one process, where there is one job or one worker, nothing is started at all.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data.base import DataError

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")

_shared: Any = None  # in a worker, what its tasks have in common


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def check_workers(workers: int) -> None:
    """Raise DataError for fewer than one."""
    if workers < 1:
        raise DataError(f"workers {workers} must be at least 1")


def run_all(
    task: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job], *, workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (number of the job, task(shared, job)) as they finish.

    `task` is a module's function; `shared` is sent once to each of up to `workers` processes. The
    first error ends it all, once what is under way is finished. Raises DataError if `workers` is
    below 1, or one of them is killed.
    """
    check_workers(workers)
    if min(workers, len(jobs)) <= 1:
        for number, job in enumerate(jobs):
            yield number, task(shared, job)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([task.__module__])
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (shared,))
    try:
        numbers = {pool.submit(_run, task, job): number for number, job in enumerate(jobs)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, for want of memory perhaps; run it again with fewer "
            "workers: what is finished is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(shared: Any) -> None:
    """Make a process a worker: interrupts are its parent's to handle, whose end is its own."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(task: Callable[[Any, Job], Result], job: Job) -> Result:
    return task(_shared, job)
