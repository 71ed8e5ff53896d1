"""Pictures of receptive fields and attention: panels in a row, each with a caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .attention import Seen
from .fields import Field

Picture = Image.Image

_SIDE = 300  # pixels of a panel's longer side
_GAP, _LINE = 10, 17
_INK, _PAPER = (40, 40, 44), (255, 255, 255)
_DECADES = 3.0  # below the strongest pixel of a receptive field that colours tell apart
_LEAST = 10.0  # times its even share that a cell has to get for the brightest colour
_LENS = 7  # cells that are shown enlarged around the place that looks,
_SMALL = 3 * _LENS  # where the shorter side of the image has this many or more
# From nothing to all, by even steps: dark violet, crimson, orange, pale yellow.
_HEAT = np.array(
    [(8, 6, 24), (48, 16, 90), (112, 24, 108), (176, 42, 90), (228, 86, 50), (250, 158, 26),
     (252, 252, 180)],
    np.float64,
)  # fmt: skip


def panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a panel for images of `size` (height, width)."""
    factor = _SIDE / max(size)
    return max(1, round(size[1] * factor)), max(1, round(size[0] * factor))


def draw_fields(fields: Sequence[Field]) -> Picture:
    """One panel a stage, on a logarithmic scale, with how far the field reaches."""
    panels, captions = [], []
    for stage, field in enumerate(fields, start=1):
        pixels = field.pixels.double()
        level = (pixels / pixels.max()).clamp(min=1e-300).log10() / _DECADES + 1
        picture = Image.fromarray(_heat(level.clamp(min=0).numpy()))
        size = panel_size((pixels.shape[0], pixels.shape[1]))
        panels.append(picture.resize(size, Image.Resampling.BICUBIC))
        half, most = (f"{100 * field.area(share):.2g}" for share in (0.5, 0.95))
        captions.append(f"stage {stage}\n50 % of it in {half} % of the area, 95 % in {most} %")
    return _row(panels, captions)


def draw_attention(
    photograph: Picture, place: tuple[float, float], seen: Sequence[Seen]
) -> Picture:
    """The photograph with the place that looks marked, and one panel a stage drawn over it.

    A cell is the brighter, the more often it has its even share of the attention.
    """
    marked = photograph.copy()
    _mark(marked, place)
    panels, captions = [marked], ["the place that looks"]
    for stage, one in enumerate(seen, start=1):
        density = one.density()
        times = density / density.mean()
        strength = times.clamp(min=1).log() / math.log(max(times.max().item(), _LEAST))
        panel = _over(photograph, strength.numpy())
        share = one.fovea()
        told = "" if share is None else f", {100 * share:.0f} % in the window"
        captions.append(
            f"stage {stage}, {one.grid[0]} x {one.grid[1]} cells{told}\n"
            f"brightest cell: {times.max().item():.3g} times its even share"
        )
        if share is not None and min(one.grid) >= _SMALL:
            _enlarge(panel, one)
        panels.append(panel)
    return _row(panels, captions)


def _over(photograph: Picture, strength: NDArray[np.float64]) -> Picture:
    """Draw strengths in [0, 1] [H, W] over a grey photograph, brighter where stronger."""
    level = Image.fromarray(strength.astype(np.float32)).resize(
        photograph.size, Image.Resampling.NEAREST
    )
    values = np.asarray(level, np.float64)
    grey = np.asarray(photograph.convert("L"), np.float64)[..., None]
    opaque = 0.1 + 0.75 * values[..., None] ** 0.7
    mixed = (1 - opaque) * grey * 0.8 + opaque * _heat(values)
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _enlarge(panel: Picture, seen: Seen) -> None:
    """Show the cells around the query in the corner of the panel that is far from them."""
    lens = max(panel.size) // 3
    (rows, columns), (row, column) = seen.grid, seen.query
    width, height = panel.width / columns, panel.height / rows
    left, top = (column - _LENS // 2) * width, (row - _LENS // 2) * height
    part = panel.crop((left, top, left + _LENS * width, top + _LENS * height))
    x = 0 if column > columns / 2 else panel.width - lens
    y = 0 if row > rows / 2 else panel.height - lens
    panel.paste(part.resize((lens, lens), Image.Resampling.NEAREST), (x, y))
    ImageDraw.Draw(panel).rectangle((x, y, x + lens - 1, y + lens - 1), outline=_PAPER)


def _heat(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours [H, W, 3] of values in [0, 1]."""
    steps = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, steps, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _mark(picture: Picture, place: tuple[float, float]) -> None:
    """Draw a ring around a (row, column) given as shares of the height and width."""
    x, y = place[1] * picture.width, place[0] * picture.height
    draw = ImageDraw.Draw(picture)
    for radius, colour, width in ((9, _INK, 4), (8, _PAPER, 2)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)


def _row(panels: Sequence[Picture], captions: Sequence[str]) -> Picture:
    """Put panels of one size side by side, each above its caption of up to two lines."""
    width, height = panels[0].size
    step = max(width, _SIDE) + _GAP
    sheet = Image.new("RGB", (len(panels) * step + _GAP, height + 3 * _GAP + 2 * _LINE), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        sheet.paste(panel, (_GAP + place * step, _GAP))
        for line, text in enumerate(caption.splitlines()):
            top = height + 2 * _GAP + line * _LINE
            draw.text((_GAP + place * step, top), text, fill=_INK, font=font)
    return sheet
