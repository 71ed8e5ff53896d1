"""Pictures with boxes, masks and names drawn on them: the truth on the left, a guess beside it."""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

GAP = 4  # white pixels between truth and guess


def side_by_side(
    image: Tensor,
    truth: dict[str, Tensor],
    found: dict[str, Tensor],
    *,
    classes: tuple[str, ...],
    least_score: float = 0.3,
) -> Tensor:
    """Return uint8 [H, 2 W + 4, 3]: an image uint8 [3, H, W] with its labels, and with detections.

    Detections whose score is below `least_score` are left out, all but the best one.
    """
    scores = found["scores"]
    kept = scores >= scores.amax().clamp(max=least_score) if len(scores) else scores > 0
    shown = {name: value[kept].cpu() for name, value in found.items()}
    sides = [_drawn(image, one, classes) for one in (truth, shown)]
    gap = torch.full((3, image.shape[1], GAP), 255, dtype=torch.uint8)
    return torch.cat((sides[0], gap, sides[1]), dim=2).permute(1, 2, 0)


def _drawn(image: Tensor, objects: dict[str, Tensor], classes: tuple[str, ...]) -> Tensor:
    if len(objects["labels"]) == 0:
        return image
    labels = objects["labels"].tolist()
    colours = [_colour(label) for label in labels]
    if "masks" in objects:
        masks = objects["masks"].reshape(len(labels), *image.shape[1:]) >= 0.5
        image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colours)
    names = [classes[label] for label in labels]
    if "scores" in objects:
        names = [
            f"{name} {100 * score:.0f}"
            for name, score in zip(names, objects["scores"].tolist(), strict=True)
        ]
    drawn: Tensor = draw_bounding_boxes(
        image, objects["boxes"], labels=names, colors=colours, width=2
    )
    return drawn


def _colour(label: int) -> tuple[int, int, int]:
    """Hues apart from one another, neighbours the most."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 1 - 0.3 * (label % 2))
    return int(255 * red), int(255 * green), int(255 * blue)
