"""What is counted on a test set, and the mean corruption error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.base import Batch

SEVERITIES = (1, 2, 3, 4, 5)

ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""AlexNet's top-1 error in percent for each corruption of ImageNet-C, the mean of five severities:
what errors are measured by (Hendrycks and Dietterich, arXiv 1903.12261)."""


@dataclass(frozen=True, kw_only=True)
class CorruptionError:
    """Top-1 errors in percent at severities 1 to 5, and their sum in percent of AlexNet's."""

    errors: tuple[float, ...]
    relative: float


def corruption_errors(top1: Mapping[str, float]) -> dict[str, CorruptionError]:
    """Return the error of each corruption from the top-1, in percent, of `CORRUPTION/SEVERITY`."""
    found = {}
    for kind, reference in ALEXNET_ERRORS.items():
        errors = tuple(100 - top1[f"{kind}/{severity}"] for severity in SEVERITIES)
        relative = 100 * sum(errors) / (reference * len(SEVERITIES))
        found[kind] = CorruptionError(errors=errors, relative=relative)
    return found


def mean(values: Sequence[float]) -> float:
    """Return the mean of numbers of which there is at least one."""
    return sum(values) / len(values)


class Among(nn.Module):
    """A classifier that chooses among some `classes` of its own: logits [B, len(classes)]."""

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.classes = torch.tensor(classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images [B, 3, H, W], in the order of the classes."""
        logits: Tensor = self.model(images)
        return logits[:, self.classes.to(logits.device)]


class AnyOf:
    """Whether guesses are among an image's right `answers`, bool [n, classes]."""

    def __init__(self, answers: NDArray[np.bool_]) -> None:
        self._answers = torch.from_numpy(answers)

    def __call__(self, guesses: Tensor, batch: Batch) -> Tensor:
        """Return bool [B, K]: which of K guesses [B, K], best first, count as right.

        At K guesses an image counts once, so that the first right guess is the only one.
        """
        rows = self._answers[batch.ids.clamp(min=0)].to(guesses.device)
        right = rows.gather(1, guesses)
        return right & (right.cumsum(dim=1) == 1)
