"""Pictures put together from photographs and cut-outs, with a mask for each thing in them.

Owns where a cut-out comes to lie, and what is left to be seen of it. Invariants: every pixel where
a cut-out is more than half opaque belongs to exactly one mask, that of the uppermost; a picture is
a function of its split, its number and what it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.pack import SPLITS
from data.randomness import Purpose, uniforms

WIDTH, HEIGHT = 320, 240
MAX_INSTANCES = 4
MIN_VISIBLE = 0.5
"""Share of a cut-out's pixels that is to be seen."""

_SOLID = 128  # alpha from which on a pixel is the thing's
_SIDES = (40, 120)  # square root of width times height, in pixels: the least, and what may be added
_MAX_ENLARGED = 1.6
_MAX_SHARE = 0.9  # of the picture's width and height
_TRIES = 32
_DRAWS = 8  # random numbers of a try


@dataclass(frozen=True, kw_only=True)
class Scraps:
    """What the pictures of a split are made of.

    `photographs` are RGB and no smaller than pictures; `cutouts` are the RGBA images of each
    category, with nothing but soft edges around them.
    """

    photographs: Sequence[Image.Image]
    cutouts: Sequence[Sequence[Image.Image]]


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A cut-out in a picture: `category` from 1 on, `mask` bool [H, W] of its visible pixels.

    `whole` is how many pixels it has, seen or not.
    """

    category: int
    whole: int
    mask: NDArray[np.bool_]


def compose(scraps: Scraps, *, split: str, number: int) -> tuple[NDArray[np.uint8], list[Instance]]:
    """Return picture `number` of a split: uint8 [H, W, 3], and one to four instances, lowest first.

    A cut-out that would leave itself or another with less than half of its pixels is not pasted:
    so everything that is to be seen of one is annotated.
    """

    def draw(part: int) -> Iterator[float]:
        key, epoch = number * (_TRIES + 1) + part, SPLITS.index(split)
        return iter(uniforms(0, epoch, key, Purpose.PASTE, count=_DRAWS).ravel().tolist())

    first = draw(_TRIES)
    canvas = _tile(_pick(scraps.photographs, next(first)), first)
    wanted = 1 + int(next(first) * MAX_INSTANCES)
    instances: list[Instance] = []
    for number_of_try in range(_TRIES):
        draws = draw(number_of_try)
        category = int(next(draws) * len(scraps.cutouts))
        cutout = _resized(_pick(scraps.cutouts[category], next(draws)), draws)
        corner = _corner(cutout, draws)
        pasted = _uncovered(instances, cutout, corner, category + 1)
        if all(one.mask.sum() >= MIN_VISIBLE * one.whole for one in pasted):
            canvas.paste(cutout, corner, cutout)
            instances = pasted
        if len(instances) == wanted:
            break
    return np.asarray(canvas), instances


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Return COCO's uncompressed RLE of bool [H, W]: lengths of runs down the columns, 0s first."""
    pixels = mask.ravel(order="F")
    bounds = np.flatnonzero(np.diff(pixels)) + 1
    counts: list[int] = np.diff(bounds, prepend=0, append=pixels.size).tolist()
    return [0, *counts] if pixels[0] else counts


def _pick(images: Sequence[Image.Image], draw: float) -> Image.Image:
    return images[int(draw * len(images))]


def _tile(photograph: Image.Image, draws: Iterator[float]) -> Image.Image:
    """Return a random part of a photograph, of the picture's size, turned about or not."""
    largest = min(photograph.width / WIDTH, photograph.height / HEIGHT)
    scale = 1 + (largest - 1) * next(draws)  # photographs are larger than pictures
    width, height = round(WIDTH * scale), round(HEIGHT * scale)
    left = int((photograph.width - width + 1) * next(draws))
    top = int((photograph.height - height + 1) * next(draws))
    tile = photograph.crop((left, top, left + width, top + height))
    return _turned(tile.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), next(draws))


def _resized(cutout: Image.Image, draws: Iterator[float]) -> Image.Image:
    """Return a cut-out at a random size, turned about or not. Small ones are more frequent."""
    draw = next(draws)
    side = _SIDES[0] + _SIDES[1] * draw * draw
    factor = min(
        side / math.sqrt(cutout.width * cutout.height),
        _MAX_ENLARGED,
        _MAX_SHARE * WIDTH / cutout.width,
        _MAX_SHARE * HEIGHT / cutout.height,
    )
    width, height = round(cutout.width * factor), round(cutout.height * factor)
    resized = cutout.resize((max(1, width), max(1, height)), Image.Resampling.BICUBIC)
    return _turned(resized, next(draws))


def _turned(image: Image.Image, draw: float) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw < 0.5 else image


def _corner(cutout: Image.Image, draws: Iterator[float]) -> tuple[int, int]:
    """Return where its left upper corner lies; up to a quarter may be out of the picture."""
    x = (WIDTH - cutout.width / 2) * next(draws) - cutout.width / 4
    y = (HEIGHT - cutout.height / 2) * next(draws) - cutout.height / 4
    return round(x), round(y)


def _uncovered(
    below: Sequence[Instance], cutout: Image.Image, corner: tuple[int, int], category: int
) -> list[Instance]:
    """Return what is visible of all when a cut-out is pasted over those that are there."""
    alpha = cutout.getchannel("A")
    layer = Image.new("L", (WIDTH, HEIGHT))
    layer.paste(alpha, corner)
    mask = np.asarray(layer) >= _SOLID
    whole = int((np.asarray(alpha) >= _SOLID).sum())
    left = [
        Instance(category=one.category, whole=one.whole, mask=one.mask & ~mask) for one in below
    ]
    return [*left, Instance(category=category, whole=whole, mask=mask)]
