"""AutoAugment's searched policies for ImageNet (Cubuk et al., arXiv:1805.09501), and 3-Augment.

Owns the tables. `original` is the paper's; `v0` that of TensorFlow's EfficientNet code; their
twins with an r posterize as Google's research code does, the more the higher the magnitude; `3a`
is 3-Augment (Touvron et al., arXiv:2204.07118): solarize, greyscale or blur. Invariant: the
result is a pure function of the picture and a fixed number of uniform draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.operations import DRAWS_PER_STEP, Canvas, Severity, Step

SubPolicy = tuple[Step, ...]

# A sub-policy a line; of each step the operation, its probability and its magnitude.
_ORIGINAL = """
PosterizeOriginal 0.4 8, Rotate 0.6 9
Solarize 0.6 5, AutoContrast 0.6 5
Equalize 0.8 8, Equalize 0.6 3
PosterizeOriginal 0.6 7, PosterizeOriginal 0.6 6
Equalize 0.4 7, Solarize 0.2 4
Equalize 0.4 4, Rotate 0.8 8
Solarize 0.6 3, Equalize 0.6 7
PosterizeOriginal 0.8 5, Equalize 1.0 2
Rotate 0.2 3, Solarize 0.6 8
Equalize 0.6 8, PosterizeOriginal 0.4 6
Rotate 0.8 8, Color 0.4 0
Rotate 0.4 9, Equalize 0.6 2
Equalize 0.0 7, Equalize 0.8 8
Invert 0.6 4, Equalize 1.0 8
Color 0.6 4, Contrast 1.0 8
Rotate 0.8 8, Color 1.0 2
Color 0.8 8, Solarize 0.8 7
Sharpness 0.4 7, Invert 0.6 8
ShearX 0.6 5, Equalize 1.0 9
Color 0.4 0, Equalize 0.6 3
Equalize 0.4 7, Solarize 0.2 4
Solarize 0.6 5, AutoContrast 0.6 5
Invert 0.6 4, Equalize 1.0 8
Color 0.6 4, Contrast 1.0 8
Equalize 0.8 8, Equalize 0.6 3
"""
_V0 = """
Equalize 0.8 1, ShearY 0.8 4
Color 0.4 9, Equalize 0.6 3
Color 0.4 1, Rotate 0.6 8
Solarize 0.8 3, Equalize 0.4 7
Solarize 0.4 2, Solarize 0.6 2
Color 0.2 0, Equalize 0.8 8
Equalize 0.4 8, SolarizeAdd 0.8 3
ShearX 0.2 9, Rotate 0.6 8
Color 0.6 1, Equalize 1.0 2
Invert 0.4 9, Rotate 0.6 0
Equalize 1.0 9, ShearY 0.6 3
Color 0.4 7, Equalize 0.6 0
Posterize 0.4 6, AutoContrast 0.4 7
Solarize 0.6 8, Color 0.6 9
Solarize 0.2 4, Rotate 0.8 9
Rotate 1.0 7, TranslateYRel 0.8 9
ShearX 0.0 0, Solarize 0.8 4
ShearY 0.8 0, Color 0.6 4
Color 1.0 0, Rotate 0.6 2
Equalize 0.8 4, Equalize 0.0 8
Equalize 1.0 4, AutoContrast 0.6 2
ShearY 0.4 7, SolarizeAdd 0.6 7
Posterize 0.8 2, Solarize 0.6 10
Solarize 0.6 8, Equalize 0.6 1
Color 0.8 6, Rotate 0.4 5
"""
_THREE = """
Solarize 1.0 5
Desaturate 1.0 10
GaussianBlurRand 1.0 10
"""


def _parse(table: str) -> tuple[SubPolicy, ...]:
    return tuple(tuple(map(_parse_step, line.split(", "))) for line in table.strip().splitlines())


def _parse_step(text: str) -> Step:
    name, prob, magnitude = text.split()
    return Step(name=name, prob=float(prob), magnitude=float(magnitude))


POLICIES = {
    "original": _parse(_ORIGINAL),
    "originalr": _parse(_ORIGINAL.replace("PosterizeOriginal", "PosterizeIncreasing")),
    "v0": _parse(_V0),
    "v0r": _parse(_V0.replace("Posterize", "PosterizeIncreasing")),
    "3a": _parse(_THREE),
}


@dataclass(frozen=True, kw_only=True)
class AutoAugment:
    """One of the sub-policies per image, evenly: its steps in order, varied by `severity`."""

    sub_policies: tuple[SubPolicy, ...]
    severity: Severity = field(default_factory=Severity)

    @property
    def num_draws(self) -> int:
        """How many uniform numbers `apply` is given for an image."""
        return 1 + DRAWS_PER_STEP * max(map(len, self.sub_policies))

    def apply(
        self, picture: Image.Image, draws: NDArray[np.float64], canvas: Canvas
    ) -> Image.Image:
        """Apply the policy to an RGB picture; `draws` are `num_draws` uniform numbers."""
        steps = self.sub_policies[int(draws[0] * len(self.sub_policies))]
        rows = draws[1:].reshape(-1, DRAWS_PER_STEP).tolist()
        for step, row in zip(steps, rows[: len(steps)], strict=True):
            picture = step.apply(picture, row, canvas, self.severity)
        return picture
