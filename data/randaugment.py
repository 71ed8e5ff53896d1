"""RandAugment (Cubuk et al., arXiv:1909.13719), with the sets of operations that timm knows.

Invariant: the result is a pure function of the picture and a fixed number of uniform draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.base import DataError
from data.operations import DRAWS_PER_STEP, MAX_LEVEL, OPERATIONS, Canvas, Severity, Step

PLAIN = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
INCREASING = tuple(
    f"{name}Increasing" if f"{name}Increasing" in OPERATIONS else name for name in PLAIN
)
_THREE = ("SolarizeIncreasing", "Desaturate", "GaussianBlur")
_WEIGHTS = {  # of operations that help the most, going by the paper's tables
    "Rotate": 3.0,
    "ShearX": 2.0,
    "ShearY": 2.0,
    "TranslateXRel": 1.0,
    "TranslateYRel": 1.0,
    "ColorIncreasing": 0.25,
    "SharpnessIncreasing": 0.25,
    "AutoContrast": 0.25,
    "SolarizeIncreasing": 0.05,
    "SolarizeAdd": 0.05,
    "ContrastIncreasing": 0.05,
    "BrightnessIncreasing": 0.05,
    "Equalize": 0.05,
    "PosterizeIncreasing": 0.05,
    "Invert": 0.05,
}
_THREE_WEIGHTS = {
    **dict.fromkeys(_THREE, 6.0),
    "Rotate": 3.0,
    "ShearX": 2.0,
    "ShearY": 2.0,
    "PosterizeIncreasing": 1.0,
    "AutoContrast": 1.0,
    "ColorIncreasing": 1.0,
    "SharpnessIncreasing": 1.0,
    "ContrastIncreasing": 1.0,
    "BrightnessIncreasing": 1.0,
    "Equalize": 1.0,
    "Invert": 1.0,
}


# By the name that follows t in a policy; a set with weights is drawn from without replacement.
SETS: dict[str, tuple[str, ...] | dict[str, float]] = {
    "weights": _WEIGHTS,
    "3a": _THREE,
    "3aw": _THREE_WEIGHTS,
}


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_ops` operations per image, each applied with probability `prob`.

    They are chosen evenly among `operations`, or, where there are `weights`, by these and none of
    them twice. `magnitude` is varied as `severity` says.
    """

    magnitude: float = MAX_LEVEL
    num_ops: int = 2
    prob: float = 0.5
    severity: Severity = field(default_factory=Severity)
    operations: tuple[str, ...] = PLAIN
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.num_ops > len(self.operations):
            raise DataError(
                f"RandAugment cannot choose {self.num_ops} different ones of "
                f"{len(self.operations)} weighted operations: lower n"
            )

    @property
    def num_draws(self) -> int:
        """How many uniform numbers `apply` consumes for an image."""
        return (1 + DRAWS_PER_STEP) * self.num_ops

    def apply(
        self, picture: Image.Image, draws: NDArray[np.float64], canvas: Canvas
    ) -> Image.Image:
        """Apply the policy to an RGB picture; `draws` are `num_draws` uniform numbers."""
        rows = draws.reshape(self.num_ops, -1)
        for name, row in zip(self.choose(rows[:, 0]), rows[:, 1:].tolist(), strict=True):
            step = Step(name=name, prob=self.prob, magnitude=self.magnitude)
            picture = step.apply(picture, row, canvas, self.severity)
        return picture

    def choose(self, draws: NDArray[np.float64]) -> list[str]:
        """Return the names of the operations that `num_ops` uniform numbers stand for."""
        if self.weights is None:
            return [self.operations[int(draw * len(self.operations))] for draw in draws]
        left = dict(zip(self.operations, self.weights, strict=True))
        return [_take(left, float(draw)) for draw in draws]


def _take(left: dict[str, float], draw: float) -> str:
    """Remove one of `left` (name -> weight) and return it."""
    edges = np.cumsum(list(left.values()))
    index = int(np.searchsorted(edges, draw * edges[-1], side="right"))
    name = list(left)[min(index, len(left) - 1)]  # a product may round up to the last edge
    del left[name]
    return name
