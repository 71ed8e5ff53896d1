"""`foveate explain IMAGE ... --source SOURCE --out DIR`: pictures of what a network sees."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data.mixing import normalize
from models.base import ModelError

from ..config import UserError
from ..metrics import write_pictures
from ..pretrained import Pretrained, pretrained
from .attention import attention
from .draw import Picture, draw_attention, draw_fields, panel_size
from .fields import receptive_fields

_LEAST_SIDE = 32  # pixels, the smallest image that the networks take


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and write the pictures; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        photographs = {_name(path): _read(path) for path in options.images}
        source = pretrained(options.source, weights=options.weights)
        options.out.mkdir(parents=True, exist_ok=True)
        size = tuple(options.img_size or [source.config.img_size])
        pictures = explain(source, photographs, size=(size[0], size[-1]), place=options.query)
        for name, picture in pictures.items():
            path = options.out / f"{name}.png"
            picture.save(path)
            print(f"wrote {path}")
        write_pictures(options.out, {name: np.asarray(one) for name, one in pictures.items()})
        print(f"in TensorBoard: tensorboard --logdir {options.out}")
    except (UserError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error}; make room or give access there", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells report it
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for what cannot be drawn."""
    if len(set(map(_name, options.images))) < len(options.images):
        raise UserError("two of the images have one name: their pictures need names of their own")
    sizes = options.img_size
    if sizes is not None and (len(sizes) > 2 or min(sizes) < _LEAST_SIDE):
        raise UserError(
            f"--img-size {' '.join(map(str, sizes))}: give a side, or height and width, of at "
            f"least {_LEAST_SIDE} pixels"
        )
    if not all(0 <= share <= 1 for share in options.query):
        raise UserError(
            f"--query {options.query[0]:g} {options.query[1]:g}: give a row and a column as shares "
            "of the height and width, 0 to 1"
        )
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out} is no folder: give another --out")


def explain(
    source: Pretrained,
    photographs: dict[str, Picture],
    *,
    size: tuple[int, int],
    place: tuple[float, float],
) -> dict[str, Picture]:
    """Return pictures by name: the receptive fields, and each photograph with its attention.

    The network sees the photographs at `size` (height, width), what is beyond that shape cut off;
    `place` is the (row, column) that looks, as shares of the height and width.

    Raises:
        ModelError: if the network does not take that size.
    """
    model = source.model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    model.reset_buffers(size)
    inputs = {name: _input(source, picture, size) for name, picture in photographs.items()}
    pictures = {"receptive_fields": draw_fields(receptive_fields(model, inputs.values()))}
    for name, photograph in photographs.items():
        if seen := attention(model, inputs[name], place):
            shown = ImageOps.fit(photograph, panel_size(size), Image.Resampling.BICUBIC)
            pictures[name] = draw_attention(shown, place, seen)
    return pictures


def _input(source: Pretrained, photograph: Picture, size: tuple[int, int]) -> Tensor:
    """What the network gets of a photograph, float32 [1, 3, H, W]."""
    fitted = ImageOps.fit(photograph, (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(fitted))[None].to(source.model.device)
    return normalize(pixels, mean=source.mean, std=source.std)


def _name(image: Path) -> str:
    return f"attention_{image.stem}"


def _read(path: Path) -> Picture:
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else "no image"
        raise UserError(f"{path} cannot be read ({said}): give JPEG or PNG files") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foveate explain",
        description="Draw what a network sees: the receptive field of each stage, averaged over "
        "the images, and for each image where the last block of each stage attends to.",
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG or PNG files")
    parser.add_argument(
        "--source",
        required=True,
        help="a run folder, a checkpoint, a bundle, a file of the authors' weights, or the name "
        "of a model, untrained",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder of the pictures"
    )
    parser.add_argument(
        "--img-size",
        nargs="+",
        type=int,
        metavar="PIXELS",
        help="a side, or height and width, of what the network sees (default: the model's own)",
    )
    parser.add_argument(
        "--query",
        nargs=2,
        type=float,
        default=(0.5, 0.5),
        metavar=("ROW", "COLUMN"),
        help="the place that looks, as shares of height and width (default: 0.5 0.5)",
    )
    parser.add_argument("--weights", choices=["ema", "live"], help="default: ema where it exists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
