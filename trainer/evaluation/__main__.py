"""`foveate evaluate SOURCE --data NAME=PATH ...`: accuracy on published test sets and others.

Each process that torchrun or srun starts takes its share of the images.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from data.base import DataError
from launcher.process import Process
from models.base import ModelError

from ..config import UserError
from ..group import gather, join
from ..pretrained import Pretrained, pretrained
from .measure import Loading, Setting, measure, settings_for
from .report import JSON, MARKDOWN, describe, notes, table, write
from .sets import BENCHMARKS, TestSet, find

_LEAST_SIDE = 32  # pixels, the smallest image that the networks take


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        device = join(Process.from_environment(os.environ))
        source, sets, settings = _prepare_alike(partial(_prepare, options))
        source.model.to(device)
        _run(options, source, sets, settings)
    except (UserError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except _Elsewhere:
        return 2
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error}; make room or give access there", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells report it
    return 0


class _Elsewhere(Exception):
    """Another rank has said what is wrong."""


Prepared = tuple[Pretrained, list[TestSet], list[Setting]]


def _prepare_alike(prepare: Callable[[], Prepared]) -> Prepared:
    """Prepare on all ranks; if some cannot, the first of them raises why, and the others leave."""
    try:
        prepared, failure = prepare(), None
    except (UserError, DataError, ModelError, OSError) as error:
        prepared, failure = None, error
    failed = [rank for rank, bad in enumerate(gather(failure is not None)) if bad]
    if failure is not None and dist.get_rank() == failed[0]:
        raise failure
    if prepared is None or failed:
        raise _Elsewhere
    return prepared


def _prepare(options: argparse.Namespace) -> Prepared:
    """Check all that can be checked before the first image."""
    source = pretrained(options.source, weights=options.weights)
    if source.model.num_classes == 0:
        raise UserError(
            f"{options.source} has no classifier: give a run, a bundle or a file of a classifier"
        )
    sets = find(options.data, num_classes=source.model.num_classes)
    settings = settings_for(source.model, options.img_size or [source.config.img_size])
    for setting in settings:
        setting.apply(source.model)
    if options.out is not None:
        if options.out.exists() and not options.out.is_dir():
            raise UserError(f"{options.out} is no folder: give another --out")
        taken = [name for name in (JSON, MARKDOWN) if (options.out / name).exists()]
        if taken:
            raise UserError(
                f"{options.out / taken[0]} is there already: remove it, or give another --out"
            )
        options.out.mkdir(parents=True, exist_ok=True)
    return source, sets, settings


def _run(
    options: argparse.Namespace,
    source: Pretrained,
    sets: list[TestSet],
    settings: list[Setting],
) -> None:
    loading = Loading(
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        precision=options.precision,
    )
    say = partial(print, file=sys.stderr, flush=True)
    scores = [
        measure(source, one, setting, loading, say=say) for one in sets for setting in settings
    ]
    if dist.get_rank() > 0:
        return
    print("\n\n".join([describe(source), table(scores), *notes(scores, sets)]))
    if options.out is not None:
        write(options.out, source, sets, scores, loading)
        print(f"\nwrote {options.out / JSON} and {options.out / MARKDOWN}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foveate evaluate",
        description="Measure a classifier on published test sets, or on labelled images of yours.",
        epilog="On several processes: srun foveate evaluate ..., or torchrun --nproc-per-node N "
        "--no-python foveate evaluate ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a run folder, a checkpoint, a bundle, or a file of the authors' weights",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=PATH",
        help=f"published sets, as they are unpacked: {', '.join(BENCHMARKS)}; or, by any other "
        "name, a folder of a folder per class or indexed shards, with the model's classes",
    )
    parser.add_argument(
        "--img-size",
        nargs="+",
        type=_at_least(_LEAST_SIDE),
        metavar="SIDE",
        help="image sides in pixels (default: the model's own)",
    )
    parser.add_argument("--weights", choices=["ema", "live"], help="default: ema where it exists")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument(
        "--batch-size",
        type=_at_least(1),
        default=128,
        help="images that a process computes at once (default: 128)",
    )
    parser.add_argument(
        "--num-workers",
        type=_at_least(1),
        default=8,
        help="threads with which a process decodes (default: 8)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"also write DIR/{JSON} and DIR/{MARKDOWN}"
    )
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return int(text)

    return whole_number


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort a process that tears down normally
