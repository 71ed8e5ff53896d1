"""What there is to find in a batch of images, in one form for denoising, matching and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .boxes import to_centres


@dataclass(frozen=True)
class Truth:
    """The labels int64 [B, M] and boxes float32 [B, M, 4] of B images, as many as the most have.

    `counts` is how many each image has: `present` [B, M] is true there, what follows is padding.
    """

    labels: Tensor
    boxes: Tensor
    counts: tuple[int, ...]

    @property
    def present(self) -> Tensor:
        """Which entries are objects, bool [B, M]."""
        counts = torch.tensor(self.counts, device=self.labels.device)
        return torch.arange(self.labels.shape[1], device=counts.device) < counts[:, None]


@dataclass(frozen=True)
class Goals:
    """What queries are to predict: the losses know nothing else of matching and denoising.

    `labels` int64 [..., Q] are classes, or their number for nothing; `boxes` float32 [..., Q, 4]
    hold where there is a class; `counted` bool [..., Q] is false for queries that are padding.
    """

    labels: Tensor
    boxes: Tensor
    counted: Tensor


def gather_truth(targets: Sequence[Mapping[str, Tensor]], sizes: Tensor) -> Truth:
    """Return the truth of targets: "boxes" [n, 4], corners in pixels, and "labels" int64 [n].

    `sizes` are the images' (height, width) in pixels, float32 [B, 2].
    """
    scales = sizes.flip(-1).repeat(1, 2)
    boxes = [
        to_centres(target["boxes"].float().reshape(-1, 4) / scale)
        for target, scale in zip(targets, scales, strict=True)
    ]
    return Truth(
        labels=pad_sequence([target["labels"] for target in targets], batch_first=True),
        boxes=pad_sequence(boxes, batch_first=True),
        counts=tuple(len(one) for one in boxes),
    )
