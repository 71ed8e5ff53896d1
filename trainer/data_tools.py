"""The data commands that ask what a run would see: `foveate data check | show | bench | doctor`.

Owns their arguments: a recipe and overrides as for pretraining, and a few options of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data.base import BadSample, DataError, Source
from models.base import ModelError

from .config import RunConfig, UserError, override
from .doctor import bench, diagnose
from .inputs import make_pipeline, open_val
from .recipes import recipe
from .show import write_contact_sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options, overrides = _parser().parse_known_args(arguments)
    try:
        config = override(recipe(options.recipe), overrides)
        _run(options, config)
    except (UserError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission
        print(
            f"error: {error}; make room or give access there, or choose another place",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130  # as shells report it
    return 0


def _run(options: argparse.Namespace, config: RunConfig) -> None:
    if options.command == "check":
        print(check(config))
    elif options.command == "show":
        write_contact_sheet(config, options.out, count=options.images, epoch=options.epoch)
    elif options.command == "bench":
        print(json.dumps(bench(config, num_images=options.images)))
    else:
        print(diagnose(config, num_images=options.images, model_rate=options.rate))


def check(config: RunConfig) -> str:
    """Open both splits as a run does, read an image of each end, and return what is there.

    Of shards at a URL nothing is kept.

    Raises:
        UserError, DataError: if a run could not use them.
    """
    config = replace(config, data=replace(config.data, cache_dir=None, cache_gb=None))
    train = make_pipeline(config, torch.device("cpu")).source
    with closing(train), closing(open_val(config, classes=train.classes)) as val:
        return (
            f"{_read_ends(train)} training and {_read_ends(val)} evaluation images in "
            f"{len(train.classes)} classes"
        )


def _read_ends(source: Source) -> int:
    """Read the first and the last image of a source, and return how many it has."""
    for id in (0, len(source) - 1):
        with suppress(BadSample):  # a run can do without it
            source.read(id)
    return len(source)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foveate data",
        description="Look at what a run would see, and what it costs.",
        epilog="Settings of the recipe are overridden as in foveate pretrain.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, allow_abbrev=False)
    show = add("show", help="draw the first images of an epoch as the network sees them")
    show.add_argument("--out", type=Path, required=True, help="the PNG file to write")
    show.add_argument("--epoch", type=_at_least(0), default=0)
    measure = add("bench", help="measure the whole loader, as a line of JSON")
    doctor = add("doctor", help="name the stage that limits a run")
    doctor.add_argument(
        "--rate", type=_rate, help="images per second that a GPU takes; measured if left out"
    )
    see = add("check", help="open the data of a run, and read an image of each end")
    see.add_argument("recipe", help="as for foveate pretrain")
    for command, count in ((show, 16), (measure, 1024), (doctor, 256)):
        command.add_argument("recipe", help="as for foveate pretrain")
        command.add_argument("--images", type=_at_least(2), default=count)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is fewer than {least}")
        return int(text)

    return whole_number


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return rate


if __name__ == "__main__":
    sys.exit(main())
