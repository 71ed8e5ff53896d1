"""RandAugment (Cubuk et al., arXiv:1909.13719), with policies spelt the way timm spells them.

Owns the operations, their severities, and the policy string. Invariant: the result is a pure
function of the picture and a fixed number of uniform draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from data.base import DataError

_MAX_LEVEL = 10.0
_DRAWS_PER_OP = 5  # which operation, whether, magnitude (two), sign


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A parsed policy: `num_ops` operations per image, each applied with probability `prob`.

    A severity is drawn from a normal of mean `magnitude` and deviation `magnitude_std` (uniform
    from [0, magnitude] if that is infinite) and clipped to [0, `max_magnitude`]; 10 is the
    strongest unless `max_magnitude` says otherwise. With `increasing` a higher magnitude is
    always the stronger distortion.
    """

    magnitude: float = 10.0
    num_ops: int = 2
    prob: float = 0.5
    magnitude_std: float = 0.0
    max_magnitude: float = _MAX_LEVEL
    increasing: bool = False

    @property
    def num_draws(self) -> int:
        """How many uniform numbers `apply_policy` consumes for an image."""
        return _DRAWS_PER_OP * self.num_ops


_SECTIONS = ("m", "n", "p", "mstd", "mmax", "inc")


@cache
def parse_policy(text: str) -> Policy:
    """Parse `rand-m9-mstd0.5-inc1` and the like; raises DataError naming the part in error.

    m is the magnitude, n the number of operations, p their probability, mstd the magnitude's
    deviation (above 100: infinite), mmax its limit, inc1 asks for increasing severities.
    """
    head, *sections = text.split("-")
    if head != "rand":
        raise DataError(f"augmentation policy {text!r} must begin with 'rand-'")
    values: dict[str, float] = {}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        if match is None or match[1] not in _SECTIONS:
            raise DataError(
                f"augmentation policy {text!r}: {section!r} is not one of "
                + ", ".join(f"{key}<number>" for key in _SECTIONS)
            )
        values[match[1]] = float(match[2])
    spread = values.get("mstd", 0.0)
    return Policy(
        magnitude=values.get("m", _MAX_LEVEL),
        num_ops=int(values.get("n", 2)),
        prob=values.get("p", 0.5),
        magnitude_std=math.inf if spread > 100 else spread,
        max_magnitude=values.get("mmax", _MAX_LEVEL),
        increasing=bool(values.get("inc", 0)),
    )


def apply_policy(
    picture: Image.Image,
    policy: Policy,
    draws: NDArray[np.float64],
    *,
    resample: Image.Resampling,
    fill: tuple[int, int, int],
) -> Image.Image:
    """Apply `policy` to an RGB picture; `draws` are `policy.num_draws` uniform numbers."""
    canvas = _Canvas(resample=resample, fill=fill, increasing=policy.increasing)
    for which, whether, first, second, sign in draws.reshape(-1, _DRAWS_PER_OP).tolist():
        if whether >= policy.prob:
            continue
        operation = OPERATIONS[int(which * len(OPERATIONS))]
        level = _severity(policy, first, second) / _MAX_LEVEL
        picture = operation(picture, level, 1 if sign < 0.5 else -1, canvas)
    return picture


def _severity(policy: Policy, first: float, second: float) -> float:
    magnitude = policy.magnitude
    if math.isinf(policy.magnitude_std):
        magnitude *= first
    elif policy.magnitude_std > 0:  # Box and Muller's normal from two uniforms
        normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
        magnitude += policy.magnitude_std * normal
    return min(max(magnitude, 0.0), policy.max_magnitude)


@dataclass(frozen=True, kw_only=True)
class _Canvas:
    """What every operation of a policy shares."""

    resample: Image.Resampling
    fill: tuple[int, int, int]
    increasing: bool

    def warp(self, picture: Image.Image, *matrix: float) -> Image.Image:
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix,
            resample=self.resample,
            fillcolor=self.fill,
        )


# An operation takes a picture, a level (1 at magnitude 10), a sign of ± 1 and the canvas.
Operation = Callable[[Image.Image, float, int, _Canvas], Image.Image]


def _auto_contrast(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    return ImageOps.equalize(picture)


def _invert(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    return ImageOps.invert(picture)


def _rotate(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    """Rotate by up to 30 degrees."""
    return picture.rotate(30 * level * sign, resample=canvas.resample, fillcolor=canvas.fill)


def _posterize(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    """Keep 4 bits (level 0) down to none, or the other way round if not increasing."""
    kept = 4 - int(4 * level) if canvas.increasing else int(4 * level)
    kept = min(max(kept, 0), 8)  # a `max_magnitude` above 10 takes the level beyond 1
    mask = 256 - (256 >> kept)  # Pillow's own posterize refuses to keep no bits at all
    return picture.point([value & mask for value in range(256)] * 3)


def _solarize(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    """Invert values from a threshold up: 256 (none) down to 0, or the reverse."""
    threshold = min(256, int(256 * level))
    return ImageOps.solarize(picture, 256 - threshold if canvas.increasing else threshold)


def _solarize_add(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    """Brighten the darker half by up to 110."""
    added = min(128, int(110 * level))
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Blend with the degenerate image: factor 1 ± 0.9 · level, or 0.1 to 1.9."""

    def operation(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
        factor = max(0.1, 1 + 0.9 * level * sign) if canvas.increasing else 0.1 + 1.8 * level
        return enhancer(picture).enhance(factor)

    return operation


def _shear_x(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    return canvas.warp(picture, 1, 0.3 * level * sign, 0, 0, 1, 0)


def _shear_y(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    return canvas.warp(picture, 1, 0, 0, 0.3 * level * sign, 1, 0)


def _translate_x(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    """Shift by up to 45 % of the width."""
    return canvas.warp(picture, 1, 0, 0.45 * level * sign * picture.width, 0, 1, 0)


def _translate_y(picture: Image.Image, level: float, sign: int, canvas: _Canvas) -> Image.Image:
    """Shift by up to 45 % of the height."""
    return canvas.warp(picture, 1, 0, 0, 0, 1, 0.45 * level * sign * picture.height)


OPERATIONS: tuple[Operation, ...] = (
    _auto_contrast,
    _equalize,
    _invert,
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
