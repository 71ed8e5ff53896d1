"""`foveate export`: folders for other libraries, which load without Foveate and prove it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Never, get_args

from models.base import ModelError
from models.convert import Layout

from ..config import UserError
from .folder import verify
from .formats import FORMATS, export
from .source import fold, load


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> Never:
        raise UserError(f"{message} ({self.prog} --help says more)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="foveate export", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("source", type=Path, nargs="?", help="a run, a checkpoint, or a file of the authors'")
    add(
        "--format",
        choices=FORMATS,
        help="what loads it; timm and transformers are one folder, dense is that without the head",
    )
    add("--out", type=Path, help="the folder to write")
    add("--weights", choices=["ema", "live"], help="of a run; default: ema where it exists")
    add("--model", help="the model that a file of the authors' has to be of")
    add("--img-size", type=int, help="side of the images; default: as trained")
    add("--layout", choices=get_args(Layout), default="classification", help="of official files")
    add(
        "--fold-batch-norm",
        action="store_true",
        help="fold batch norms into the layers beside them: faster, and for evaluation alone",
    )
    add("--verify", type=Path, metavar="DIR", help="check such a folder instead")
    return parser


def main() -> int:
    """Export a model, or verify an exported folder; return the exit code."""
    try:
        options = _parser().parse_args()
        if options.verify is not None:
            verify(options.verify)
            return 0
        for name in ("source", "format", "out"):
            if getattr(options, name) is None:
                raise UserError(f"no {name} is given (foveate export --help says more)")
        source = load(
            options.source,
            weights=options.weights,
            name=options.model,
            img_size=options.img_size,
        )
        if options.fold_batch_norm:
            source = fold(source)
        export(source, options.out, form=options.format, layout=options.layout)
    except (UserError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"exported {options.source} to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
