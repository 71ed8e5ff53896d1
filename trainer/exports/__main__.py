"""`foveate export`: folders for other libraries, which load without Foveate and prove it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Never, get_args

from models.base import ModelError
from models.convert import Layout

from ..config import UserError
from ..pretrained import Pretrained
from .bundle import write_bundle, write_configuration
from .card import card
from .folder import verify, write_folder
from .graphs import write_onnx, write_program
from .official import write_official
from .sample import make_sample
from .source import fold, load, without_head

_CHECKS = {"onnx": "check_onnx", "torch": "check_torch", "official": "check_official"}


def export(source: Pretrained, out: Path, *, form: str, layout: Layout = "classification") -> None:
    """Write a model in the format `form` to the folder `out`, and verify it.

    Raises:
        UserError: if `out` is in the way or cannot be written, or what is in it does not verify.
        ModelError: if the model has no such form.
    """
    is_timms = source.config.name.startswith("timm:")
    if is_timms and form not in ("timm", "onnx", "torch"):
        raise UserError(f"{source.config.name} is timm's own: export it as timm, onnx or torch")
    if form == "dense" or (form, layout) == ("official", "dense"):
        source = without_head(source)
    writers: dict[str, Callable[[Pretrained, Path], None]] = {
        "onnx": write_onnx,
        "torch": write_program,
        "official": partial(write_official, layout=layout),
    }

    def write(folder: Path) -> None:
        writers.get(form, write_bundle)(source, folder)
        write_configuration(source, folder)
        (folder / "README.md").write_text(card(source, form=form))

    check = f"trainer.exports.{_CHECKS.get(form, 'check_bundle')}"
    write_folder(out, write, check=check, sample=make_sample(source))


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
        choices=["timm", "transformers", "dense", "onnx", "torch", "official"],
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
