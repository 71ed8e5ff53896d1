"""Effective receptive fields: which pixels a stage's centre answers to, and how much.

As in Luo et al., arXiv 1701.04128, by gradients; read as in RepLKNet, arXiv 2203.06717: of the
centre's positive features, by the shares of centred boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import Backbone


@dataclass(frozen=True, kw_only=True)
class Field:
    """How much each pixel [H, W] moves the unit at `centre`, a (row, column) in pixels."""

    pixels: Tensor
    centre: tuple[float, float]

    def area(self, share: float) -> float:
        """Return which share of the image the smallest box has that holds `share` of the field.

        The box is centred on the unit and shaped like the image.
        """
        distances = [
            (torch.arange(size, dtype=torch.float64) + 0.5 - middle).abs() * (2 / size)
            for size, middle in zip(self.pixels.shape, self.centre, strict=True)
        ]
        reach = torch.maximum(distances[0][:, None], distances[1]).flatten()
        order = reach.argsort()
        held = self.pixels.flatten().double()[order].cumsum(dim=0)
        edge = reach[order[int((held < share * held[-1]).sum())]]
        return min(1.0, float(edge) ** 2)


def receptive_fields(model: Backbone, images: Iterable[Tensor]) -> list[Field]:
    """Return the field of each stage's centre, its mean over images float32 [1, 3, H, W].

    A pixel counts by the magnitude of its gradient, colours added up. What is followed back is the
    sum of the unit's positive features: that of all is constant behind a layer norm.
    """
    sums: list[Tensor] = []
    centres: list[tuple[float, float]] = []
    count = 0
    for image in images:
        pixels = image.detach().requires_grad_()
        maps = model.forward_features(pixels)
        moved = [_moved_by(pixels, one) for one in maps]
        sums = moved if not sums else [a + b for a, b in zip(sums, moved, strict=True)]
        centres = [_centre_in_pixels(one.shape[2:], image.shape[2:]) for one in maps]
        count += 1
    return [
        Field(pixels=total.cpu() / count, centre=centre)
        for total, centre in zip(sums, centres, strict=True)
    ]


def _moved_by(pixels: Tensor, features: Tensor) -> Tensor:
    """Magnitude [H, W] of the gradient of the centre of features [1, C, H', W']."""
    _, _, height, width = features.shape
    unit = features[0, :, height // 2, width // 2].relu().sum()
    (gradient,) = torch.autograd.grad(unit, pixels, retain_graph=True)
    return gradient[0].abs().sum(dim=0)


def _centre_in_pixels(grid: Sequence[int], size: Sequence[int]) -> tuple[float, float]:
    row, column = (
        (cells // 2 + 0.5) * pixels / cells for cells, pixels in zip(grid, size, strict=True)
    )
    return row, column
