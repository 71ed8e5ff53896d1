"""`foveate finetune TASK`: pretrained weights put to use, on this machine.

Classification is a run like any other, by a recipe that begins from weights. The other tasks are
programs of trainer.finetune, started here as a run's workers are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from trainer.config import UserError, nearest

from . import local, rundir
from .process import Process

USAGE = """\
usage: foveate finetune TASK --backbone SOURCE --out DIR [--nproc N] [--SECTION.SETTING VALUE ...]

SOURCE is a run folder, one of its checkpoints, a bundle that foveate export wrote, or a file of
weights. The same command again goes on where an interrupted one was.

tasks:
  classify   all of the network at 384 pixels, on any folder or shards of images
  probe      a linear probe and a k-NN classifier on frozen features
  detect     --head mask_rcnn | retinanet | dino, on pictures labelled in COCO's format
  segment    --head upernet | mask2former | semantic_fpn, on pictures labelled pixel by pixel

foveate finetune TASK --head HEAD --backbone SOURCE --out DIR --help lists all settings.
"""

Start = Callable[[list[str]], int]


def run(arguments: list[str], *, pretrain: Start, python: Callable[[str, list[str]], int]) -> int:
    """Run one fine-tuning task and return its exit code.

    `pretrain` trains a recipe, and `python` becomes a program of the trainer.

    Raises:
        UserError: if the task is unknown or something is missing.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    task, *rest = arguments
    tasks = ("classify", "probe", "detect", "segment")
    if task not in tasks:
        raise UserError(
            f"unknown task {task}{nearest(task, tasks)} (known: {', '.join(tasks)}; foveate "
            "finetune --help says more)"
        )
    options, settings = _options(task).parse_known_args(rest)
    if {"-h", "--help"} & set(settings) and task != "classify":
        return python("trainer.finetune", arguments)
    missing = [name for name in ("backbone", "out") if getattr(options, name) is None]
    if missing:
        raise UserError(f"--{missing[0]} is missing: {USAGE.splitlines()[0]}")
    number = [] if options.nproc is None else ["--nproc", str(options.nproc)]
    if task == "classify":
        where = ["--run-dir", options.out, *number]
        return pretrain([f"classify:{options.backbone}", *where, *settings])
    given = ["--backbone", options.backbone, "--out", options.out, *settings]
    return _start(task, given, Path(options.out), options.nproc)


def _options(task: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"foveate finetune {task}", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--backbone")
    parser.add_argument("--out")
    parser.add_argument("--nproc", type=int)
    return parser


def _start(task: str, arguments: list[str], out: Path, num_processes: int | None) -> int:
    if Process.from_environment(os.environ).world_size > 1:
        raise UserError(
            "foveate finetune starts its workers itself: run it once, without torchrun or srun; "
            "srun starts `python -m trainer.finetune` with the same arguments"
        )
    count = max(1, local.num_gpus()) if num_processes is None else num_processes
    if count < 1:
        raise UserError(f"--nproc is {count}: give at least 1")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
    print(f"{task} in {out}, {count} processes", flush=True)
    sys.stdout.flush()
    worker = ["-m", "trainer.finetune", task, *arguments]
    return local.launch(out, num_processes=count, worker=worker, code=rundir.CODE)
