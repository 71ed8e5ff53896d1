"""How training for semantic segmentation changes a picture: size, crop, flip and colours.

Owns the recipe that MMSegmentation made common for ADE20K. Everything is drawn from torch's global
generator, which the dataset seeds for each sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .heads.semantic import IGNORED

_CROP_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What a training picture goes through, in this order.

    It is scaled to fit into `box` (longer side, shorter side) times a factor from `ratios`; cropped
    to `crop` pixels square, another place being tried while one class has more than `max_share` of
    the crop; mirrored with probability 1/2; changed in colour; and padded with the colour `fill`
    (0..255) where it is smaller than the crop.
    """

    box: tuple[int, int] = (2048, 512)
    ratios: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    max_share: float = 0.75
    fill: tuple[int, int, int] = (124, 116, 104)


def augment(image: Tensor, labels: Tensor, spec: Augmentation) -> tuple[Tensor, Tensor]:
    """Return an image uint8 [3, crop, crop] and its labels uint8 [crop, crop].

    Given are those of any size, [3, H, W] and [H, W].
    """
    ratio = uniform(*spec.ratios)
    size = fitted_size((image.shape[1], image.shape[2]), spec.box, ratio)
    image, labels = resize_image(image, size), resize_labels(labels, size)
    top, left = _crop_place(labels, spec)
    height, width = min(spec.crop, size[0]), min(spec.crop, size[1])
    image = F.crop(image, top, left, height, width)
    labels = F.crop(tv_tensors.Mask(labels), top, left, height, width)
    if torch.rand(()) < 0.5:
        image, labels = F.horizontal_flip(image), F.horizontal_flip(labels)
    image = distort(image)
    padding = [0, 0, spec.crop - width, spec.crop - height]
    image = F.pad(image, padding, fill=list(spec.fill))
    labels = F.pad(labels, padding, fill=IGNORED)
    return image, labels.as_subclass(Tensor)


def uniform(low: float, high: float) -> float:
    """Return a number drawn from torch's global generator."""
    return low + (high - low) * torch.rand(()).item()


def fitted_size(size: tuple[int, int], box: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
    """Return the (height, width) that fits into `ratio` times the `box` (longer, shorter side)."""
    factor = min(
        int(max(box) * ratio + 0.5) / max(size),
        int(min(box) * ratio + 0.5) / min(size),
    )
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image [3, H, W] as [3, *size], in its dtype."""
    resized: Tensor = F.resize_image(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return resized


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return labels [H, W] as [*size]: of each new pixel's centre."""
    resized: Tensor = F.resize_image(labels[None], list(size), InterpolationMode.NEAREST_EXACT)
    return resized[0]


def _crop_place(labels: Tensor, spec: Augmentation) -> tuple[int, int]:
    """Return the top left corner of a crop in which no class has too large a share.

    After some tries it is whatever came last.
    """
    height, width = labels.shape
    for _ in range(_CROP_TRIES):
        top = int(torch.randint(max(height - spec.crop, 0) + 1, ()))
        left = int(torch.randint(max(width - spec.crop, 0) + 1, ()))
        part = labels[top : top + spec.crop, left : left + spec.crop]
        counts = torch.bincount(part.flatten(), minlength=256)[:IGNORED]
        if counts.count_nonzero() > 1 and counts.max() < spec.max_share * counts.sum():
            break
    return top, left


def distort(image: Tensor) -> Tensor:
    """Return an image, uint8 [3, H, W], in other colours, each change with probability 1/2.

    Brightness moves by up to 32 levels; contrast, before or after the others, and saturation are
    scaled by 1/2 to 3/2; the hue turns by up to a tenth of the circle.
    """
    if _happens():
        image = _scaled(image, 1.0, uniform(-32, 32))
    contrast_first, contrast = _happens(), uniform(0.5, 1.5) if _happens() else 1.0
    if contrast_first:
        image = _scaled(image, contrast)
    if _happens():
        image = F.adjust_saturation(image, uniform(0.5, 1.5))
    if _happens():
        image = F.adjust_hue(image, uniform(-0.1, 0.1))
    if not contrast_first:
        image = _scaled(image, contrast)
    return image


def _happens() -> bool:
    return bool(torch.rand(()) < 0.5)


def _scaled(image: Tensor, factor: float, offset: float = 0.0) -> Tensor:
    return (image * factor + offset).clamp(0, 255).to(torch.uint8)
