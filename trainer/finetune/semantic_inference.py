"""The class of each pixel of whole pictures: at one size or several, at once or in windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .heads.semantic import SemanticHead, resize
from .semantic_augment import fitted_size, resize_image

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a picture is looked at.

    It is scaled to fit into `box` (longer side, shorter side) times each of `scales`, and seen as
    it is and, with `flip`, mirrored too; what is made of these views is averaged. With a `window`,
    each view is seen in squares of that side, one every `stride` pixels and the last at the edge.
    """

    box: tuple[int, int] = (2048, 512)
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    stride: int = 341


@torch.no_grad()
def predict(head: SemanticHead, image: Tensor, how: Inference) -> Tensor:
    """Return probabilities float32 [num_classes, H, W] of a picture uint8 [3, H, W].

    The head is in evaluation mode; the picture is on its device. Where it weighs masks, as
    Mask2Former does, they need not add up to 1.
    """
    size = (image.shape[1], image.shape[2])
    total = torch.zeros(head.num_classes, *size, device=image.device)
    views = 0
    for scale in how.scales:
        view = resize_image(image, fitted_size(size, how.box, scale))[None].float() / 255
        for mirrored in (False, True) if how.flip else (False,):
            scores = _scores(head, view.flip(3) if mirrored else view, how)
            shares = head.probabilities(resize(scores.flip(3) if mirrored else scores, size))
            total += shares[0]
            views += 1
    return total / views


def _scores(head: SemanticHead, view: Tensor, how: Inference) -> Tensor:
    """Return scores [1, num_classes, H, W] of images [1, 3, H, W], windows averaged."""
    if how.window is None:
        whole: Tensor = head(view)
        return whole
    height, width = view.shape[2:]
    total = torch.zeros(1, head.num_classes, height, width, device=view.device)
    seen = torch.zeros(height, width, device=view.device)
    for rows in _windows(height, how.window, how.stride):
        for columns in _windows(width, how.window, how.stride):
            total[:, :, rows, columns] += head(view[:, :, rows, columns])
            seen[rows, columns] += 1
    return total / seen


def _windows(length: int, window: int, stride: int) -> Iterator[slice]:
    """Yield the windows along one side: the last ends where the side does."""
    for start in range(0, max(length - window, 0) + stride, stride):
        end = min(start + window, length)
        yield slice(max(end - window, 0), end)
        if end == length:
            return
