"""One worker of a fine-tuning run: `python -m trainer.finetune TASK --backbone SOURCE --out DIR`.

Exit codes are those of `python -m trainer`; why it ended is left in OUT/logs/failure.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Never

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
from trainer.config import UserError, override
from trainer.failures import BUG, explain
from trainer.pretrained import pretrained
from trainer.signals import Stop

from . import detect, segment
from .loop import FineTuning, Task
from .probe import ProbeSettings, probe
from .settings import DenseSettings, keep_settings


def main() -> int:
    """Run one worker and return its exit code."""
    task, *rest = sys.argv[1:]
    if {"-h", "--help"} & set(rest):
        _print_settings(task)
        return 0
    try:
        process = Process.from_environment(os.environ)
        folder = Path(_parse(rest, _Parser())[0].out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    console = open_log(folder, process.rank)
    if process.rank == 0:
        failure_file(folder).unlink(missing_ok=True)
    failure = run(task, rest, folder, process)
    if failure is None:
        return 0
    failure.leave(folder)
    print(failure.said, file=console, flush=True)
    return failure.code


def _print_settings(task: str) -> None:
    """Print every setting of a task; defaults that depend on the head are those of most."""
    import tyro

    kind: Any = {
        "probe": ProbeSettings,
        "detect": detect.DetectSettings,
        "segment": segment.SegmentSettings,
    }[task]
    with contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=f"foveate finetune {task} [--nproc N]")


def run(task: str, arguments: list[str], folder: Path, process: Process) -> Failure | None:
    """Fine-tune or probe; return why it ended before its end, or None if it did not."""
    tuning = None
    try:
        check_not_stopped(folder)
        if task == "probe":
            _probe(arguments, process)
            return None
        tuning = prepare(task, arguments, process)
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
    named, rest = _parse(arguments, _Parser())
    settings = override(ProbeSettings(backbone=named.backbone, out=named.out), rest)
    probe(settings, pretrained(settings.backbone), process)


def prepare(task: str, arguments: list[str], process: Process) -> FineTuning:
    """Return the fine-tuning that a command line asks for.

    Raises:
        UserError, DataError, ModelError: if it asks for what there is not.
    """
    parser = _Parser()
    heads = detect.HEADS if task == "detect" else segment.HEADS
    parser.add_argument("--head", choices=heads, required=True)
    named, rest = _parse(arguments, parser)
    source = pretrained(named.backbone)
    work: Task
    settings: DenseSettings
    if task == "detect":
        settings = override(detect.recipe(named.head, source, out=named.out), rest)
        work = detect.Detection(settings, source)
    else:
        settings = override(segment.recipe(named.head, source, out=named.out), rest)
        work = segment.Segmentation(settings, source)
    settings.share(process.world_size)
    if process.rank == 0:
        keep_settings(settings)
    return FineTuning(work, settings, process)


def _parse(
    arguments: list[str], parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str]]:
    """Take what decides the other settings' defaults; return it and the other arguments."""
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--out", required=True)
    return parser.parse_known_args(arguments)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> Never:
        raise UserError(f"{message} (foveate finetune --help says more)")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort a process that tears down normally
