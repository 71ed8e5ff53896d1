"""How well pixels are classified: a confusion matrix, and what is read from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .heads.semantic import IGNORED


@dataclass(frozen=True, kw_only=True)
class SemanticScores:
    """Shares in 0..1: means over classes of intersection over union and of accuracy, and the
    accuracy over all pixels.

    `iou` is by class, NaN for one that is neither in the labels nor among the predictions. Classes
    that are NaN are left out of a mean.
    """

    miou: float
    macc: float
    aacc: float
    iou: tuple[float, ...]


class ConfusionMatrix:
    """Counts of pixels, int64 [num_classes, num_classes]: labels down, predictions across."""

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count predicted classes, int64 of any shape, where `labels` of that shape are not 255."""
        counted = labels != IGNORED
        num_classes = len(self.counts)
        cells = labels[counted] * num_classes + predictions[counted]
        self.counts += torch.bincount(cells, minlength=num_classes**2).view_as(self.counts)

    def scores(self) -> SemanticScores:
        """Return the scores of all pixels that all processes have counted.

        Every process of the group, where there is one, calls it, whatever it has counted itself.
        """
        counts = self.counts.clone()
        if dist.is_initialized():
            dist.all_reduce(counts)
        counts = counts.double().cpu()
        right, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        iou = right / (labelled + predicted - right)
        return SemanticScores(
            miou=iou.nanmean().item(),
            macc=(right / labelled).nanmean().item(),
            aacc=(right.sum() / counts.sum()).item(),
            iou=tuple(iou.tolist()),
        )
