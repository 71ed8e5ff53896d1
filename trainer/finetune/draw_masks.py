"""Pictures to look at: the truth and what was predicted, side by side, with the classes' names."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .heads.semantic import IGNORED

_OPACITY = 0.6
_MARGIN = 6
_TEXT = 13  # pixels
_SWATCH = 14


def draw_masks(
    image: Tensor, labels: Tensor, predictions: Tensor, classes: Sequence[str]
) -> NDArray[np.uint8]:
    """Return uint8 [H', W', 3]: left the picture under its labels, right under the predictions.

    `image` is uint8 [3, H, W]; `labels` and `predictions` are classes [H, W]. What the labels
    ignore is black in both. Below are the names of the classes seen, most pixels first.
    """
    pixels = image.cpu().permute(1, 2, 0).numpy()
    truth = labels.cpu().numpy()
    found = np.where(truth == IGNORED, IGNORED, predictions.cpu().numpy())
    colours = palette(len(classes))
    panels = [_painted(pixels, drawn, colours) for drawn in (truth, found)]
    height, width = truth.shape
    counts = np.bincount(np.concatenate([truth.ravel(), found.ravel()]), minlength=IGNORED + 1)
    ranked = (-counts[: len(classes)]).argsort(kind="stable")
    seen = [index for index in ranked if counts[index]]
    legend = _legend([classes[index] for index in seen], colours[seen], 2 * width + _MARGIN)
    canvas = np.full((height + len(legend), 2 * width + _MARGIN, 3), 255, np.uint8)
    canvas[:height, :width], canvas[:height, -width:] = panels
    canvas[height:] = legend
    return canvas


def palette(num_classes: int) -> NDArray[np.uint8]:
    """Return colours uint8 [num_classes, 3], neighbours in the list far apart."""
    golden = (5**0.5 - 1) / 2  # steps of it spread over the circle evenly, however many there are
    hues = [index * golden % 1 for index in range(num_classes)]
    tones = [((1.0, 0.6)[index % 2], (1.0, 0.7, 0.45)[index % 3]) for index in range(num_classes)]
    colours = [colorsys.hsv_to_rgb(hue, *tone) for hue, tone in zip(hues, tones, strict=True)]
    return (np.array(colours) * 255).round().astype(np.uint8)


def _painted(
    pixels: NDArray[np.uint8], drawn: NDArray[np.int64], colours: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return the picture [H, W, 3] with each class's colour laid over its pixels."""
    ignored = drawn == IGNORED
    paint = colours[np.where(ignored, 0, drawn)]
    mixed = (1 - _OPACITY) * pixels + _OPACITY * paint
    return np.where(ignored[..., None], 0, mixed.round()).astype(np.uint8)


def _legend(names: Sequence[str], colours: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Return names beside their colours, uint8 [H, width, 3], in as many lines as they take."""
    font = ImageFont.load_default(_TEXT)
    entries = list(zip(names, map(tuple, colours.tolist()), strict=True))
    places, x, y = [], _MARGIN, _MARGIN
    for name, _ in entries:
        wide = _SWATCH + int(font.getlength(name)) + 3 * _MARGIN
        if x > _MARGIN and x + wide > width:
            x, y = _MARGIN, y + _SWATCH + _MARGIN
        places.append((x, y))
        x += wide
    picture = Image.new("RGB", (width, y + _SWATCH + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), fill=colour)
        draw.text((left + _SWATCH + _MARGIN, top), name, fill="black", font=font)
    return np.array(picture)
