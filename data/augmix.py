"""AugMix (Hendrycks et al., arXiv:1912.02781), with timm's operations and severities.

Owns the mixture of chains and its weights. Invariant: the result is a pure function of the
picture and a fixed number of uniform draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.base import DataError
from data.operations import DRAWS_PER_STEP, Canvas, Severity, Step

OPERATIONS = (
    "AutoContrast",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "Equalize",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
_MAX_DEPTH = 3
_TRANSLATE = 0.3
_UNIFORM = Severity(magnitude_std=math.inf)
_ATTEMPTS = 8  # each succeeds with at least 95 %
_DRAWS_PER_GAMMA = 1 + 3 * _ATTEMPTS


@dataclass(frozen=True, kw_only=True)
class AugMix:
    """`width` chains of operations, averaged, and blended with the picture they started from.

    A chain is `depth` operations long, or 1 to 3 where that is 0, each always applied. The chains'
    weights are drawn from Dirichlet(`alpha`), their share in the result from Beta(`alpha`,
    `alpha`).
    """

    magnitude: float = 3.0
    width: int = 3
    depth: int = 0
    alpha: float = 1.0
    severity: Severity = _UNIFORM

    def __post_init__(self) -> None:
        if self.width < 1 or self.alpha <= 0:
            raise DataError(
                f"AugMix of width {self.width} and alpha {self.alpha}: w must be at least 1 and a "
                "above 0"
            )

    @property
    def num_draws(self) -> int:
        """How many uniform numbers `apply` is given for an image."""
        return (self.width + 2) * _DRAWS_PER_GAMMA + self.width * self._draws_per_chain

    @property
    def _draws_per_chain(self) -> int:
        return 1 + (self.depth or _MAX_DEPTH) * (1 + DRAWS_PER_STEP)

    def apply(
        self, picture: Image.Image, draws: NDArray[np.float64], canvas: Canvas
    ) -> Image.Image:
        """Apply the policy to an RGB picture; `draws` are `num_draws` uniform numbers."""
        head, tail = np.split(draws, [(self.width + 2) * _DRAWS_PER_GAMMA])
        weights, share = mixing_weights(head.reshape(self.width + 2, -1), self.alpha)
        canvas = replace(canvas, translate=_TRANSLATE)
        mixed = (1 - share) * np.asarray(picture, np.float64)
        for weight, row in zip(weights, tail.reshape(self.width, -1), strict=True):
            mixed += share * weight * np.asarray(self._chain(picture, row, canvas), np.float64)
        return Image.fromarray(np.rint(mixed).astype(np.uint8))

    def _chain(
        self, picture: Image.Image, draws: NDArray[np.float64], canvas: Canvas
    ) -> Image.Image:
        depth = self.depth or 1 + int(draws[0] * _MAX_DEPTH)
        for which, *row in draws[1:].reshape(-1, 1 + DRAWS_PER_STEP)[:depth].tolist():
            name = OPERATIONS[int(which * len(OPERATIONS))]
            step = Step(name=name, prob=1.0, magnitude=self.magnitude)
            picture = step.apply(picture, row, canvas, self.severity)
        return picture


def mixing_weights(draws: NDArray[np.float64], alpha: float) -> tuple[NDArray[np.float64], float]:
    """Return Dirichlet(alpha) weights [W] and a Beta(alpha, alpha) share from uniforms [W + 2, 25].

    Both are gamma variates divided by their sum.
    """
    gammas = log_gamma_variates(draws, alpha)
    weights, pair = (np.exp(part - part.max()) for part in (gammas[:-2], gammas[-2:]))
    return weights / weights.sum(), float(pair[0] / pair.sum())


def log_gamma_variates(draws: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Return logarithms of Gamma(alpha) variates [n] from uniforms [n, 25].

    Marsaglia and Tsang's rejection (ACM TOMS 26, 2000) for alpha + 1, and their step down to alpha;
    logarithms because a small alpha leaves little that a float could hold.
    """
    first, second, accept = 1 - np.stack(np.split(draws[:, 1:], 3, axis=1))
    normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
    scale = alpha + 1 - 1 / 3
    cubed = np.maximum(1 + normal / np.sqrt(9 * scale), 1e-30) ** 3  # the floor is never accepted
    log_cubed = np.log(cubed)
    accepted = np.log(accept) < normal**2 / 2 + scale * (1 - cubed + log_cubed)
    chosen = np.take_along_axis(log_cubed, accepted.argmax(axis=1)[:, None], 1)[:, 0]
    boost = np.log(1 - draws[:, 0]) / alpha
    variates: NDArray[np.float64] = np.log(scale) + chosen + boost
    return variates
