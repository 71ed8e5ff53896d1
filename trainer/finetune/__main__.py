"""One worker of a fine-tuning run: `python -m trainer.finetune TASK --backbone SOURCE --out DIR`.

Exit codes are those of `python -m trainer`; why it ended is left in OUT/logs/failure.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launcher.process import (
    REQUEUE,
    STOPPED,
    Failure,
    Process,
    check_not_stopped,
    failure_file,
    node_name,
    open_log,
    stop_file,
)
from trainer.config import UserError, override
from trainer.failures import BUG, explain
from trainer.pretrained import pretrained
from trainer.signals import Stop

from . import detect
from .loop import FineTuning
from .probe import ProbeSettings, probe
from .settings import keep_settings


def main() -> int:
    """Run one worker and return its exit code."""
    task, *rest = sys.argv[1:]
    parser = argparse.ArgumentParser(prog=f"foveate finetune {task}", add_help=False)
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_known_args(rest)[0].out
    process = Process.from_environment(os.environ)
    console = open_log(folder, process.rank)
    if process.rank == 0:
        failure_file(folder).unlink(missing_ok=True)
    failure = run(task, rest, folder, process)
    if failure is None:
        return 0
    failure.leave(folder)
    print(failure.said, file=console, flush=True)
    return failure.code


def run(task: str, arguments: list[str], folder: Path, process: Process) -> Failure | None:
    """Fine-tune or probe; return why it ended before its end, or None if it did not."""
    tuning = None
    try:
        check_not_stopped(folder)
        if task == "probe":
            _probe(arguments, process)
            return None
        tuning = prepare(arguments, process)
        if tuning.run():
            return None
        code, go_on = REQUEUE, "start the same command again to go on"
        if tuning.signals.stop is Stop.FILE:
            code, go_on = STOPPED, f"remove {stop_file(folder)} to go on"
        message = f"step {tuning.step} is saved: {go_on}"
    except Exception as error:
        code, message = explain(error, folder)
        if code == BUG:
            print(message, file=sys.stderr, flush=True)
    return Failure(
        rank=process.rank,
        code=code,
        message=message,
        node=node_name(),
        generation=None if tuning is None else tuning.control.generation,
    )


def _probe(arguments: list[str], process: Process) -> None:
    named, rest = _parse(arguments, argparse.ArgumentParser(add_help=False, exit_on_error=False))
    settings = override(ProbeSettings(backbone=named.backbone, out=named.out), rest)
    probe(settings, pretrained(settings.backbone), process)


def prepare(arguments: list[str], process: Process) -> FineTuning:
    """Return the fine-tuning that a command line asks for.

    Raises:
        UserError, DataError, ModelError: if it asks for what there is not.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--head", choices=list(detect.HEADS), required=True)
    named, rest = _parse(arguments, parser)
    source = pretrained(named.backbone)
    settings = override(detect.recipe(named.head, source, out=named.out), rest)
    settings.share(process.world_size)
    work = detect.Detection(settings, source)
    if process.rank == 0:
        keep_settings(settings)
    return FineTuning(work, settings, process)


def _parse(
    arguments: list[str], parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str]]:
    """Take what decides the other settings' defaults; return it and the other arguments."""
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--out", required=True)
    try:
        return parser.parse_known_args(arguments)
    except (argparse.ArgumentError, SystemExit) as error:
        raise UserError(f"{error} (foveate finetune --help says more)") from None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort a process that tears down normally
