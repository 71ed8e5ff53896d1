"""The data commands: `python -m data fetch | pack | index | verify`.

Owns their arguments. Everything they write is named on standard output; an error the user can
mend ends in one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.base import DataError
from data.betonpack import IMAGE_MODES
from data.build import build
from data.columns import room_for
from data.fetch import fetch_cifar10
from data.index import known_classes, verify
from data.pack import FORMATS, pack_folder
from data.parallel import num_cores
from data.stamps import fetch_stamps

_SETS = {"cifar10": fetch_cifar10, "stamps": fetch_stamps}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except DataError as error:
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


def _run(options: argparse.Namespace) -> None:
    match options.command:
        case "fetch":
            _SETS[options.name](options.out or Path("datasets") / options.name)
        case "pack":
            pack_folder(
                options.folder,
                options.out,
                format=options.format,
                image_mode=options.image_mode,
                samples_per_shard=options.samples_per_shard,
                seed=options.seed,
                workers=options.workers,
            )
        case "index":
            folder = options.out or Path(options.location)
            with room_for(folder):
                build(
                    options.location,
                    out=options.out,
                    classes=_class_names(folder, options.classes),
                    label_field=options.label_field,
                    headers_only=options.headers_only,
                    workers=options.workers,
                )
        case "verify":
            manifest = verify(options.folder, workers=options.workers)
            print(f"{manifest.num_samples} samples, fingerprint {manifest.fingerprint}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foveate data",
        description="Make data sets ready.",
        epilog="foveate data check, show, bench and doctor RECIPE see data as a run does.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download a known data set and make it ready")
    fetch.add_argument("name", choices=_SETS)
    fetch.add_argument("--out", type=Path, help="folder to fill (default: datasets/NAME)")
    pack = commands.add_parser("pack", help="turn images into shuffled tar shards, or a .beton")
    pack.add_argument(
        "folder", type=Path, help="holds CLASS/IMAGE, {train,val}/CLASS/IMAGE, or indexed shards"
    )
    pack.add_argument("--out", type=Path, required=True, help="folder to fill")
    pack.add_argument("--format", choices=FORMATS, default="tar", help="default: tar")
    pack.add_argument(
        "--image-mode",
        choices=IMAGE_MODES,
        default="jpg",
        help="how a .beton stores images: files as they are, pixels, or pixels of small ones",
    )
    pack.add_argument("--samples-per-shard", type=int, default=1000)
    pack.add_argument("--seed", type=int, default=0, help="of the order in the shards")
    index = commands.add_parser("index", help="index the *.tar and *.beton shards of a folder")
    index.add_argument("location", help="a folder, or a URL that fsspec knows (s3://, https://, …)")
    index.add_argument("--out", type=Path, help="folder for the index of shards elsewhere")
    index.add_argument("--classes", type=Path, help="text file of class names, one a line")
    index.add_argument("--label-field", help="field of the .json members that holds the class")
    index.add_argument(
        "--headers-only",
        action="store_true",
        help="read the beginning of each image alone: fast, but damage is not noticed",
    )
    check = commands.add_parser("verify", help="compare every shard with the manifest")
    check.add_argument("folder", type=_folder_here)
    for command in (pack, index, check):
        command.add_argument(
            "--workers", type=int, default=num_cores(), help="processes (default: one per core)"
        )
    return parser


def _folder_here(text: str) -> Path:
    if "://" in text.removeprefix("file://"):
        raise argparse.ArgumentTypeError(
            f"{text} is elsewhere: index it with --out FOLDER, and verify that folder"
        )
    return Path(text.removeprefix("file://"))


def _class_names(folder: Path, file: Path | None) -> list[str] | None:
    """Return the class names in `file`, else those of the manifest there is, else None."""
    if file is not None:
        if not file.is_file():
            raise DataError(f"{file} is no file of class names")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is no text in UTF-8: it holds no class names") from error
        return [line.strip() for line in lines if line.strip()]
    names = known_classes(folder)
    return None if names is None else list(names)


if __name__ == "__main__":
    sys.exit(main())
