"""One worker: configuration -> process -> Trainer.

Exit codes: 0 done, 2 a user's mistake, 75 stopped after saving (start me again), 76 a rank got
stuck, 77 bad numerics, 78 stopped by RUN/stop; anything else is a bug and shows a traceback. What
stopped the run is left in the run folder too, since torchrun and srun hide the workers' exit codes.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys
from pathlib import Path

from launcher.process import (
    REQUEUE,
    STOPPED,
    USER_ERROR,
    Failure,
    Process,
    check_not_stopped,
    failure_file,
    node_name,
    open_log,
    stop_file,
)

from .config import RunConfig, UserError

DONE = 0


def main() -> int:
    """Run one worker and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run folder's config.json")
    path = parser.parse_args().config
    faulthandler.enable()  # a crash in somebody's native code shows where it was called
    try:
        config = RunConfig.read(path)
        process = Process.from_environment(os.environ)
        check_origin()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    console = open_log(Path(config.run_dir), process.rank)
    if process.rank == 0:
        failure_file(Path(config.run_dir)).unlink(missing_ok=True)  # an earlier start's
    failure = run(config, process)
    if failure is None:
        return DONE
    failure.leave(Path(config.run_dir))
    with contextlib.suppress(OSError):  # under a launcher, it is a log on the same disk
        print(failure.said, file=console, flush=True)
    return failure.code


def run(config: RunConfig, process: Process) -> Failure | None:
    """Train; return why it ended before the last step, or None if it did not."""
    from .failures import BUG, explain
    from .loop import Trainer
    from .signals import Stop

    trainer = None
    try:
        check_not_stopped(Path(config.run_dir))
        trainer = Trainer(config, process)
        if trainer.run():
            return None
        in_time = trainer.saved == trainer.state
        done = "is saved" if in_time else "could not be saved in the time left"
        code, go_on = REQUEUE, "start the run again to go on"
        if trainer.signals.stop is Stop.FILE:
            code, go_on = STOPPED, f"remove {stop_file(trainer.run_dir)} to go on"
        message = f"step {trainer.state.step} {done}: {go_on}"
    except Exception as error:
        code, message = explain(error, config.run_dir)
        if code == BUG:
            with contextlib.suppress(OSError):  # the log may be on the disk that is full
                print(message, file=sys.stderr, flush=True)
    if trainer is not None and not trainer.control.owns_folder():  # whatever it came to notice
        code, message = USER_ERROR, str(trainer.control.fenced())
    return Failure(
        rank=process.rank,
        code=code,
        message=message,
        node=node_name(),
        generation=None if trainer is None else trainer.control.generation,
    )


def check_origin() -> None:
    """Make sure that all four packages come from one folder, whatever else is installed.

    Raises:
        UserError: naming the package that does not.
    """
    import data
    import launcher
    import models

    home = Path(__file__).resolve().parent.parent
    for package in (launcher, models, data):
        origin = Path(str(package.__file__)).resolve().parent.parent
        if origin != home:
            raise UserError(
                f"package {package.__name__} comes from {origin}, the trainer from {home}: "
                f"set PYTHONPATH={home}"
            )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort a process that tears down normally
