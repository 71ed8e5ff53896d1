"""Arithmetic of boxes, in float32: a box is (centre x, centre y, width, height) in 0..1."""

from __future__ import annotations

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """Return (left, top, right, bottom) of (centre x, centre y, width, height) [..., 4]."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def to_centres(corners: Tensor) -> Tensor:
    """Return (centre x, centre y, width, height) of (left, top, right, bottom) [..., 4]."""
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def inverse_sigmoid(shares: Tensor, *, margin: float = 1e-3) -> Tensor:
    """Return the logits of shares held within [margin, 1 - margin]."""
    return torch.logit(shares, eps=margin)


def generalized_iou(one: Tensor, other: Tensor) -> Tensor:
    """Return GIoU (arXiv 1902.09630), in -1..1, of corners [..., 4] that broadcast.

    Boxes without an area give finite values and gradients.
    """
    union, overlap = _union_and_overlap(one, other)
    hull = _area(
        torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])
    )
    tiny = torch.finfo(hull.dtype).eps
    return overlap / (union + tiny) - (hull - union) / (hull + tiny)


def _union_and_overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(one[..., :2], other[..., :2])
    high = torch.minimum(one[..., 2:], other[..., 2:])
    overlap = _area(low, torch.maximum(low, high))
    areas = _area(one[..., :2], one[..., 2:]) + _area(other[..., :2], other[..., 2:])
    return areas - overlap, overlap


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).prod(-1)
