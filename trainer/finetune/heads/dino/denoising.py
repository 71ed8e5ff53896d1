"""Contrastive denoising: queries that begin near a known box and have to find it, or to refuse.

Each group holds every box of the image twice. The positive copy is a little off and has to be
mended; the negative copy is farther off and stands for nothing, so that of several queries around
an object only the nearest claims it. Groups neither see each other nor are seen by the queries
that are matched, to which they would tell the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import inverse_sigmoid, to_centres, to_corners
from .truth import Goals, Truth

LABEL_NOISE = 0.25  # the share of queries told a random class: half of the published scale 0.5
BOX_NOISE = 1.0  # how far corners move, in half sides: positives up to it, negatives up to twice


@dataclass(frozen=True)
class Denoising:
    """D denoising queries per image, in `groups` groups, and what they are to predict.

    `labels` int64 [B, D] are the classes that they are told, `anchors` [B, D, 4] the boxes that
    they begin with, as logits. Within a group the positives come first.
    """

    labels: Tensor
    anchors: Tensor
    groups: int
    goals: Goals

    @property
    def real(self) -> Tensor:
        """Which queries stand for a box at all, bool [B, D]: images have different numbers."""
        return self.goals.counted


def denoise(truth: Truth, *, num_classes: int, queries: int) -> Denoising:
    """Return noisy copies of what is there, drawn from torch's global generator.

    There are about `queries` positives in the image with the most boxes, at least one per box,
    and none at all where no image has a box.
    """
    batch, most = truth.labels.shape
    groups = max(queries // max(most, 1), 1)

    def copies(values: Tensor) -> Tensor:
        return values[:, None, None].expand(-1, groups, 2, *values.shape[1:])

    known, real, labels = copies(truth.boxes), copies(truth.present), copies(truth.labels)
    negative = torch.tensor([False, True], device=known.device)[:, None].expand(
        batch, groups, 2, most
    )
    anchors = inverse_sigmoid(_shifted(known, negative))
    told = torch.where(
        torch.rand(labels.shape, device=labels.device) < LABEL_NOISE,
        torch.randint_like(labels, num_classes),
        labels,
    )
    goals = Goals(
        labels=labels.masked_fill(negative | ~real, num_classes).flatten(1),
        boxes=known.flatten(1, 3),
        counted=real.flatten(1),
    )
    return Denoising(told.flatten(1), anchors.flatten(1, 3), groups, goals)


def _shifted(boxes: Tensor, negative: Tensor) -> Tensor:
    """Boxes [..., 4] whose corners each moved by 0..1 half sides, or by 1..2 if `negative`."""
    half_sides = torch.cat([boxes[..., 2:], boxes[..., 2:]], -1) / 2
    distance = torch.rand_like(boxes) + negative[..., None]
    direction = torch.randint_like(boxes, 2) * 2 - 1
    moved = direction * distance * half_sides * BOX_NOISE
    return to_centres((to_corners(boxes) + moved).clamp(0, 1))


def visibility(denoising: Tensor, matched: Tensor, *, groups: int) -> Tensor:
    """Return which query (row) may see which (column), bool [B, D + Q, D + Q].

    `denoising` [B, D] and `matched` [B, Q] tell the queries that are real: nothing else is seen,
    but by itself. Denoising queries come first, in `groups` groups of equal size.
    """
    count = denoising.shape[1]
    device = matched.device
    group = torch.full((count + matched.shape[1],), -1, device=device)
    group[:count] = torch.arange(groups, device=device).repeat_interleave(count // groups)
    open_to = (group[:, None] == group) | (group == -1)
    itself = torch.eye(len(group), dtype=torch.bool, device=device)
    return open_to & torch.cat([denoising, matched], 1)[:, None] | itself
