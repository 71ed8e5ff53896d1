"""The data commands that ask what a run would see: `foveate data show | bench | doctor RECIPE`.

Owns their arguments: a recipe and overrides as for pretraining, and a few options of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data.base import DataError

from .config import RunConfig, UserError, override
from .doctor import bench, diagnose
from .recipes import recipe
from .show import write_contact_sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options, overrides = _parser().parse_known_args(arguments)
    try:
        config = override(recipe(options.recipe), overrides)
        _run(options, config)
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error}; free or choose another place", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, config: RunConfig) -> None:
    if options.command == "show":
        write_contact_sheet(config, options.out, count=options.images, epoch=options.epoch)
    elif options.command == "bench":
        print(json.dumps(bench(config, num_images=options.images)))
    else:
        print(diagnose(config, num_images=options.images, model_rate=options.rate))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foveate data",
        description="Look at what a run would see, and what it costs.",
        epilog="Settings of the recipe are overridden as in foveate pretrain.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="draw the first images of an epoch as the network")
    show.add_argument("--out", type=Path, required=True, help="the PNG file to write")
    show.add_argument("--epoch", type=int, default=0)
    measure = commands.add_parser("bench", help="measure the whole loader, as a line of JSON")
    doctor = commands.add_parser("doctor", help="name the stage that limits a run")
    doctor.add_argument(
        "--rate", type=float, help="images per second that a GPU takes; measured if left out"
    )
    for command, count in ((show, 16), (measure, 1024), (doctor, 256)):
        command.add_argument("recipe", help="as for foveate pretrain")
        command.add_argument("--images", type=_positive, default=count)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} is fewer than 2")
    return value


if __name__ == "__main__":
    sys.exit(main())
