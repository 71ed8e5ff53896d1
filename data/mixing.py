"""On-device colour augmentation, normalisation, mixup, cutmix and random erasing of a micro-batch.

Parameters are drawn on the CPU from (seed, epoch, pair) or (seed, epoch, position) and applied to
the whole batch on its device, without waiting for it. Invariant: positions 2j and 2j+1 of an
epoch are each other's partner and share one λ, so that what a sample turns into does not depend
on how many processes share the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.base import Batch, DataError
from data.color import ColorSpec, recolor
from data.device import to_device
from data.randomness import GOLDEN, Purpose, stream_keys, uniforms

_BETA_ATTEMPTS = 24
_ERASE_ATTEMPTS = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))


@dataclass(frozen=True, kw_only=True)
class MixSpec:
    """What happens to a batch on the device.

    `color` comes first, on the images as they were augmented.
    `mixup` and `cutmix` are the α of their Beta(α, α), 0 for off (Zhang et al., arXiv:1710.09412;
    Yun et al., arXiv:1905.04899); with both on, `switch_prob` is cutmix's share. `erase_prob` is
    the chance of one erased rectangle of normal noise per image (Zhong et al., arXiv:1708.04896).
    `mean` and `std` are of pixels scaled to [0, 1].
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.0
    erase_prob: float = 0.0
    color: ColorSpec = field(default_factory=ColorSpec)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("switch_prob", "label_smoothing", "erase_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} {getattr(self, name)} must lie in [0, 1]")
        if self.mixup < 0 or self.cutmix < 0:
            raise DataError(f"mixup {self.mixup} and cutmix {self.cutmix} must not be negative")


@dataclass(frozen=True, kw_only=True)
class MixParams:
    """The mixing of P pairs: λ float64 [P] and the pasted box int64 [P, 4].

    A box is (top, bottom, left, right); it is empty where a pair is blended, and λ is its
    uncovered share where it is not.
    """

    lam: NDArray[np.float64]
    box: NDArray[np.int64]


def normalize(images: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return uint8 [B, H, W, 3] as float32 [B, 3, H, W], channels last in memory."""
    device = images.device
    scale = to_device(np.array([1 / (255 * s) for s in std], np.float32), device)
    shift = to_device(
        np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32), device
    )
    return torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2)


class Mixer:
    """Turns micro-batches into network inputs and soft targets, as `spec` and `seed` say."""

    def __init__(self, spec: MixSpec, *, seed: int) -> None:
        self.spec = spec
        self.seed = seed

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images float32 [B, 3, H, W] (channels last) and targets float32 [B, num_classes].

        B must be even and the batch start at an even position.
        """
        spec = self.spec
        positions = batch.positions.numpy()
        pixels = recolor(batch.images, spec.color, positions, seed=self.seed, epoch=batch.epoch)
        images = normalize(pixels, mean=spec.mean, std=spec.std)
        targets = smooth_one_hot(
            batch.labels, num_classes=spec.num_classes, smoothing=spec.label_smoothing
        )
        if spec.mixup > 0 or spec.cutmix > 0:
            assert (positions[::2] % 2 == 0).all(), "pairs are torn"
            size = (images.shape[-2], images.shape[-1])
            params = draw_mixing(spec, positions[::2] // 2, size, seed=self.seed, epoch=batch.epoch)
            images, targets = _mix(images, targets, params)
        if spec.erase_prob > 0:
            images = _erase(images, positions, spec.erase_prob, seed=self.seed, epoch=batch.epoch)
        return images, targets


def smooth_one_hot(labels: Tensor, *, num_classes: int, smoothing: float) -> Tensor:
    """Return float32 [B, num_classes]: 1 - smoothing on the label, plus smoothing spread evenly."""
    floor = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), floor, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + floor)


def draw_mixing(
    spec: MixSpec, pairs: NDArray[np.int64], size: tuple[int, int], *, seed: int, epoch: int
) -> MixParams:
    """Draw the mixing of `pairs` (position // 2, int64 [P]) of images of `size` (H, W)."""
    draws = uniforms(seed, epoch, pairs, Purpose.MIX, count=3 + 2 * _BETA_ATTEMPTS)
    switch = spec.switch_prob if spec.mixup > 0 else 1.0
    cut = (draws[:, 0] < switch) & (spec.cutmix > 0)
    blended = symmetric_beta(draws[:, 3:], spec.mixup) if spec.mixup > 0 else np.ones(len(pairs))
    kept = symmetric_beta(draws[:, 3:], spec.cutmix) if spec.cutmix > 0 else np.ones(len(pairs))
    box = np.where(cut[:, None], _paste_box(kept, draws[:, 1:3], size), 0)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    lam = np.where(cut, 1 - area / (size[0] * size[1]), blended)
    return MixParams(lam=lam, box=box)


def symmetric_beta(draws: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Return Beta(alpha, alpha) variates [P] from uniforms [P, 48].

    Ulrich's polar formula for alpha > 1/2 and Jöhnk's rejection below, where at least 78 % of
    attempts succeed (Devroye, Non-Uniform Random Variate Generation, IX.4).
    """
    if alpha > 0.5:
        radius = np.sqrt(1 - draws[:, 0] ** (2 / (2 * alpha - 1)))
        return 0.5 + 0.5 * radius * np.cos(2 * np.pi * draws[:, 1])
    first, second = (1 - np.stack(np.split(draws, 2, axis=1))) ** (1 / alpha)
    accepted = np.argmax(first + second <= 1, axis=1)[:, None]
    chosen = np.take_along_axis(first, accepted, 1)[:, 0]
    other = np.take_along_axis(second, accepted, 1)[:, 0]
    with np.errstate(invalid="ignore"):  # both underflow for a tiny alpha: either end will do
        ratio = chosen / (chosen + other)
    return np.where(np.isfinite(ratio), ratio, 1.0)


def draw_erasing(
    positions: NDArray[np.int64], size: tuple[int, int], prob: float, *, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to erase, int64 [M], and their boxes (top, bottom, left, right) [M, 4].

    Area is uniform in [0.02, 1/3] of the image of `size` (H, W), aspect log-uniform in
    [0.3, 1/0.3]; the first of ten attempts that fits is taken.
    """
    draws = uniforms(seed, epoch, positions, Purpose.ERASE, count=3 + 2 * _ERASE_ATTEMPTS)
    height, width = size
    area = _between(draws[:, 3 : 3 + _ERASE_ATTEMPTS], *_ERASE_AREA) * height * width
    ratio = np.exp(_between(draws[:, 3 + _ERASE_ATTEMPTS :], *_ERASE_LOG_RATIO))
    heights = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    widths = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (heights < height) & (widths < width)
    rows = np.flatnonzero((draws[:, 0] < prob) & fits.any(axis=1))
    attempt = fits[rows].argmax(axis=1)
    tall, wide = heights[rows, attempt], widths[rows, attempt]
    top = (draws[rows, 1] * (height - tall + 1)).astype(np.int64)
    left = (draws[rows, 2] * (width - wide + 1)).astype(np.int64)
    return rows, np.stack([top, top + tall, left, left + wide], axis=1)


def normal_noise(keys: Tensor, *, count: int) -> Tensor:
    """Return standard normal float32 [M, count] from stream keys int64 [M], on their device.

    The numbers are hashes of (key, index) put through Box and Muller's transform, so each row
    is the same in whatever batch, process or order it is computed.
    """
    strides = torch.arange(1, count + 1, device=keys.device) * _signed(GOLDEN)
    bits = _mix64(keys[:, None] + strides)
    radius = _logical_shift(bits, 40).add_(1).float().mul_(2.0**-24)  # (0, 1]
    angle = (bits & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return radius.log_().mul_(-2).sqrt_().mul_(angle.cos_())


def _mix(images: Tensor, targets: Tensor, params: MixParams) -> tuple[Tensor, Tensor]:
    device = images.device
    lam = to_device(np.repeat(params.lam, 2).astype(np.float32), device)
    pasted = _inside(to_device(np.repeat(params.box, 2, axis=0), device), images.shape[-2:])
    boxed = to_device(np.repeat(params.box[:, 1] > params.box[:, 0], 2), device)
    blend = torch.where(boxed, 1.0, lam)[:, None, None, None]
    weight = torch.where(pasted, 0.0, blend)  # [B, 1, H, W]
    mixed = images * weight + _partners(images) * (1 - weight)
    return mixed, targets * lam[:, None] + _partners(targets) * (1 - lam[:, None])


def _partners(values: Tensor) -> Tensor:
    """Swap rows 2j and 2j+1."""
    rows = torch.arange(len(values), device=values.device) ^ 1
    return values.index_select(0, rows)


def _erase(
    images: Tensor, positions: NDArray[np.int64], prob: float, *, seed: int, epoch: int
) -> Tensor:
    """Fill one rectangle of some images with normal noise, in place."""
    size = (images.shape[-2], images.shape[-1])
    rows, boxes = draw_erasing(positions, size, prob, seed=seed, epoch=epoch)
    if not len(rows):
        return images
    device = images.device
    keys = stream_keys(seed, epoch, positions[rows], Purpose.ERASE_NOISE).view(np.int64)
    noise = normal_noise(to_device(keys, device), count=size[0] * size[1] * 3)
    noise = noise.view(-1, *size, 3).permute(0, 3, 1, 2)
    index = to_device(rows, device)
    erased = torch.where(
        _inside(to_device(boxes, device), size), noise, images.index_select(0, index)
    )
    return images.index_copy_(0, index, erased)


def _paste_box(
    lam: NDArray[np.float64], centre: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.int64]:
    """Return the box of area (1 - lam) around a uniform centre, clipped: int64 [P, 4]."""
    edges = []
    for side, draw in zip(size, centre.T, strict=True):
        length = (side * np.sqrt(1 - lam)).astype(np.int64)
        middle = (draw * side).astype(np.int64)
        edges.append(np.clip(middle - length // 2, 0, side))
        edges.append(np.clip(middle + (length + 1) // 2, 0, side))
    return np.stack(edges, axis=1)


def _inside(boxes: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return bool [M, 1, H, W]: which pixels lie in (top, bottom, left, right) of each row."""
    top, bottom, left, right = boxes[:, None, None, :].unbind(-1)
    rows = torch.arange(size[0], device=boxes.device)[None, :, None]
    columns = torch.arange(size[1], device=boxes.device)[None, None, :]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return inside[:, None]


def _between(draws: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + draws * (high - low)


def _signed(value: int) -> int:
    """Return a 64-bit pattern as the signed integer torch wants."""
    return value - (1 << 64) if value >> 63 else value


def _logical_shift(values: Tensor, bits: int) -> Tensor:
    """Shift right filling with zeros: torch has signed 64-bit integers alone."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(values: Tensor) -> Tensor:
    """SplitMix64's output function, as `randomness.mix64`, on int64 tensors that wrap around."""
    values = (values ^ _logical_shift(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _logical_shift(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _logical_shift(values, 31)
