"""What a prediction loses against its goals: focal loss of classes, L1 and GIoU of boxes."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from .boxes import generalized_iou, to_corners
from .truth import Goals

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 1.0, 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0


def focal_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each class's focal loss (arXiv 1708.02002) if it is there, and if it is not."""
    share = logits.sigmoid()
    present = ALPHA * (1 - share) ** GAMMA * F.softplus(-logits)
    absent = (1 - ALPHA) * share**GAMMA * F.softplus(logits)
    return present, absent


def set_losses(logits: Tensor, boxes: Tensor, goals: Goals, objects: Tensor) -> dict[str, Tensor]:
    """Return the weighted losses "class", "l1" and "giou" of each of S stages, [S].

    `logits` are [S, B, Q, classes], `boxes` [S, B, Q, 4]; all are divided by the number of
    `objects`. Without any object the losses of boxes are zeros that still have a gradient.
    """
    num_classes = logits.shape[-1]
    present, absent = focal_terms(logits)
    one_hot = F.one_hot(goals.labels, num_classes + 1)[..., :num_classes].bool()
    classes = torch.where(one_hot, present, absent) * goals.counted[..., None]
    found = goals.labels < num_classes
    apart = (boxes - goals.boxes).abs() * found[..., None]
    similar = generalized_iou(to_corners(boxes), to_corners(goals.boxes))
    return {
        "class": CLASS_WEIGHT * classes.sum((1, 2, 3)) / objects,
        "l1": L1_WEIGHT * apart.sum((1, 2, 3)) / objects,
        "giou": GIOU_WEIGHT * ((1 - similar) * found).sum((1, 2)) / objects,
    }


def mean_over_ranks(counts: Tensor) -> Tensor:
    """Return counts averaged over all processes, if there are several; at least 1.

    The mean and not the sum, as gradients are averaged over processes too.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(counts)
        counts = counts / distributed.get_world_size()
    return counts.clamp(min=1)
