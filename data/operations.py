"""The operations that augmentation policies are made of, named and scaled the way timm does.

Owns what an operation does to a picture at a severity, and how a severity is drawn. Invariant: a
step is a pure function of the picture and `DRAWS_PER_STEP` uniform numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

MAX_LEVEL = 10.0
DRAWS_PER_STEP = 5  # whether, magnitude (two), sign, and a share: of the filters or of a range


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What the operations of a policy share.

    Each that resamples picks one of the filters `resample`; what it uncovers gets the colour
    `fill`. `translate` is the furthest shift, as a share of the picture.
    """

    resample: tuple[Image.Resampling, ...]
    fill: tuple[int, int, int]
    translate: float = 0.45


@dataclass(frozen=True, kw_only=True)
class Severity:
    """How the magnitude of an operation varies from picture to picture.

    It is drawn from a normal of deviation `magnitude_std` (uniform from 0 up to the magnitude if
    that is infinite) and clipped to [0, `max_magnitude`].
    """

    magnitude_std: float = 0.0
    max_magnitude: float = MAX_LEVEL

    def level(self, magnitude: float, first: float, second: float) -> float:
        """Return a severity, 1 at magnitude 10, from two uniform numbers."""
        if math.isinf(self.magnitude_std):
            magnitude *= first
        elif self.magnitude_std > 0:  # Box and Muller's normal from two uniforms
            normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
            magnitude += self.magnitude_std * normal
        return min(max(magnitude, 0.0), self.max_magnitude) / MAX_LEVEL


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation, its probability and the mean of its magnitude."""

    name: str
    prob: float
    magnitude: float

    def apply(
        self, picture: Image.Image, draws: Sequence[float], canvas: Canvas, severity: Severity
    ) -> Image.Image:
        """Apply the step to an RGB picture; `draws` are `DRAWS_PER_STEP` uniform numbers."""
        whether, first, second, sign, share = draws
        if whether >= self.prob:
            return picture
        setting = Setting(
            level=severity.level(self.magnitude, first, second),
            sign=1 if sign < 0.5 else -1,
            share=share,
            canvas=canvas,
        )
        return OPERATIONS[self.name](picture, setting)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One application of an operation: its severity `level`, ± 1, a uniform number, the canvas."""

    level: float
    sign: int
    share: float
    canvas: Canvas

    @property
    def signed(self) -> float:
        """The level, towards one side or the other."""
        return self.level * self.sign

    @property
    def resample(self) -> Image.Resampling:
        """The filter to resample with."""
        filters = self.canvas.resample
        return filters[int(self.share * len(filters))]

    def warp(self, picture: Image.Image, *matrix: float) -> Image.Image:
        """Return the picture under an affine map: `matrix` is its two rows."""
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix,
            resample=self.resample,
            fillcolor=self.canvas.fill,
        )


Operation = Callable[[Image.Image, Setting], Image.Image]


def _auto_contrast(picture: Image.Image, setting: Setting) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, setting: Setting) -> Image.Image:
    return ImageOps.equalize(picture)


def _invert(picture: Image.Image, setting: Setting) -> Image.Image:
    return ImageOps.invert(picture)


def _rotate(picture: Image.Image, setting: Setting) -> Image.Image:
    """Rotate by up to 30 degrees."""
    return picture.rotate(
        30 * setting.signed, resample=setting.resample, fillcolor=setting.canvas.fill
    )


def _posterize(kept_bits: Callable[[int], int]) -> Operation:
    """Keep so many of the eight bits of a channel, given four times the level."""

    def operation(picture: Image.Image, setting: Setting) -> Image.Image:
        kept = kept_bits(int(4 * setting.level))
        kept = min(max(kept, 0), 8)  # a `max_magnitude` above 10 takes the level beyond 1
        mask = 256 - (256 >> kept)  # Pillow's own posterize refuses to keep no bits at all
        return picture.point([value & mask for value in range(256)] * 3)

    return operation


def _solarize(picture: Image.Image, setting: Setting) -> Image.Image:
    """Invert values from a threshold of 0 (all of them, at level 0) up to 256 (none)."""
    return ImageOps.solarize(picture, min(256, int(256 * setting.level)))


def _solarize_increasing(picture: Image.Image, setting: Setting) -> Image.Image:
    return ImageOps.solarize(picture, 256 - min(256, int(256 * setting.level)))


def _solarize_add(picture: Image.Image, setting: Setting) -> Image.Image:
    """Brighten the darker half by up to 110."""
    added = min(128, int(110 * setting.level))
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Blend with the degenerate image by a factor from 0.1 (level 0) to 1.9."""

    def operation(picture: Image.Image, setting: Setting) -> Image.Image:
        return enhancer(picture).enhance(0.1 + 1.8 * setting.level)

    return operation


def _enhance_increasing(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Blend with the degenerate image by a factor of 1 ± 0.9 · level."""

    def operation(picture: Image.Image, setting: Setting) -> Image.Image:
        return enhancer(picture).enhance(max(0.1, 1 + 0.9 * setting.signed))

    return operation


def _desaturate(picture: Image.Image, setting: Setting) -> Image.Image:
    """Take out half of the colour (level 0) up to all of it."""
    removed = 0.5 + 0.5 * min(setting.level, 1.0)
    return ImageEnhance.Color(picture).enhance(1 - removed)


def _blur(picture: Image.Image, setting: Setting) -> Image.Image:
    """Blur by a Gaussian whose deviation is 0.1 (level 0) to 2 pixels."""
    radius = 0.1 + 1.9 * min(setting.level, 1.0)
    return picture.filter(ImageFilter.GaussianBlur(radius))


def _blur_randomly(picture: Image.Image, setting: Setting) -> Image.Image:
    """Blur by a Gaussian whose deviation is drawn between 0.1 and 2 · level pixels."""
    radius = 0.1 + (2 * min(setting.level, 1.0) - 0.1) * setting.share
    return picture.filter(ImageFilter.GaussianBlur(radius))


def _shear_x(picture: Image.Image, setting: Setting) -> Image.Image:
    return setting.warp(picture, 1, 0.3 * setting.signed, 0, 0, 1, 0)


def _shear_y(picture: Image.Image, setting: Setting) -> Image.Image:
    return setting.warp(picture, 1, 0, 0, 0.3 * setting.signed, 1, 0)


def _translate_x(picture: Image.Image, setting: Setting) -> Image.Image:
    shift = setting.canvas.translate * setting.signed * picture.width
    return setting.warp(picture, 1, 0, shift, 0, 1, 0)


def _translate_y(picture: Image.Image, setting: Setting) -> Image.Image:
    shift = setting.canvas.translate * setting.signed * picture.height
    return setting.warp(picture, 1, 0, 0, 0, 1, shift)


# Where a name has an `Increasing` twin, that one distorts the more the higher the level is, while
# the plain one follows TensorFlow's EfficientNet code, and `PosterizeOriginal` the paper.
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize(lambda bits: bits),
    "PosterizeIncreasing": _posterize(lambda bits: 4 - bits),
    "PosterizeOriginal": _posterize(lambda bits: 4 + bits),
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize_increasing,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "ColorIncreasing": _enhance_increasing(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "ContrastIncreasing": _enhance_increasing(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "BrightnessIncreasing": _enhance_increasing(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "SharpnessIncreasing": _enhance_increasing(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
    "Desaturate": _desaturate,
    "GaussianBlur": _blur,
    "GaussianBlurRand": _blur_randomly,
}
