"""Colour augmentation of whole batches, on the device: jitter, greyscale, blur and solarize.

Owns what may happen to colours alone, in this order. Parameters are drawn on the CPU from (seed,
epoch, position) and applied without waiting for the device; values are floats until they are
rounded to eight bits once. Invariant: what becomes of an image does not depend on the batch it is
in, so there is no sum over pixels whose order could matter: the one mean there is, is of integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.base import DataError
from data.device import to_device
from data.randomness import Purpose, uniforms

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what grey means to Pillow and torchvision
_FIXED_POINT = 256  # steps per level in which the mean grey is summed
_SIGMA = (0.1, 2.0)
_REACH = 11  # of the blur, in pixels: the kernel of 23 that timm uses
_SOLARIZE_FROM = 128


@dataclass(frozen=True, kw_only=True)
class ColorSpec:
    """What happens to colours, each with its probability.

    `color_jitter` is how far brightness, contrast and saturation are scaled, by 1 ± so much: one
    number for all, or one each, and a fourth for the hue, which is turned by ± that share of the
    circle. They are applied in random order. Then come greyscale, a Gaussian blur of deviation 0.1
    to 2 pixels (Chen et al., arXiv:2002.05709) and solarize, which inverts what is brighter than
    half (Grill et al., arXiv:2006.07733).
    """

    color_jitter: float | tuple[float, ...] = 0.0
    color_jitter_prob: float = 1.0
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    solarize_prob: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.color_jitter, tuple) and len(self.color_jitter) not in (3, 4):
            raise DataError(
                f"color_jitter {self.color_jitter} must be one number, or brightness, contrast, "
                "saturation and, if wanted, hue"
            )
        if min(self.strengths) < 0 or self.strengths[HUE] > 0.5:
            raise DataError(
                f"color_jitter {self.color_jitter} must not be negative, and the hue's at most 0.5"
            )
        for name in ("color_jitter", "grayscale", "gaussian_blur", "solarize"):
            value = getattr(self, f"{name}_prob")
            if not 0 <= value <= 1:
                raise DataError(f"{name}_prob {value} must lie in [0, 1]")

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """Of brightness, contrast, saturation and hue."""
        if not isinstance(self.color_jitter, tuple):
            return self.color_jitter, self.color_jitter, self.color_jitter, 0.0
        brightness, contrast, saturation, *hue = self.color_jitter
        return brightness, contrast, saturation, hue[0] if hue else 0.0

    @property
    def jitters(self) -> bool:
        """Whether any image is jittered."""
        return max(self.strengths) > 0 and self.color_jitter_prob > 0

    @property
    def active(self) -> bool:
        """Whether anything happens to any image."""
        later = (self.grayscale_prob, self.gaussian_blur_prob, self.solarize_prob)
        return self.jitters or max(later) > 0


@dataclass(frozen=True, kw_only=True)
class ColorParams:
    """What happens to B images.

    `factors` float64 [B, 4] of brightness, contrast, saturation (1 changes nothing) and hue (in
    turns; 0 changes nothing); `order` int64 [B, S], which of them comes at each of S places;
    `gray` and `solarized` bool [B]; `sigma` float64 [B], the blur's deviation, 0 for none.
    """

    order: NDArray[np.int64]
    factors: NDArray[np.float64]
    gray: NDArray[np.bool_]
    sigma: NDArray[np.float64]
    solarized: NDArray[np.bool_]


def recolor(
    images: Tensor, spec: ColorSpec, positions: NDArray[np.int64], *, seed: int, epoch: int
) -> Tensor:
    """Return uint8 [B, H, W, 3] augmented as `spec` says, on their device.

    `positions` int64 [B], the images' places in the epoch, tell one view from another.
    """
    if not spec.active:
        return images
    return apply_color(images, draw_color(spec, positions, seed=seed, epoch=epoch))


def draw_color(
    spec: ColorSpec, positions: NDArray[np.int64], *, seed: int, epoch: int
) -> ColorParams:
    """Draw what happens to the images at `positions` int64 [B]."""
    draws = uniforms(seed, epoch, positions, Purpose.COLOR_JITTER, count=9)
    strengths = np.array(spec.strengths)
    low, high = np.maximum(0, 1 - strengths), 1 + strengths
    low[HUE], high[HUE] = -strengths[HUE], strengths[HUE]
    jittered = draws[:, :1] < spec.color_jitter_prob
    num_places = 4 if strengths[HUE] > 0 else 3
    blur = uniforms(seed, epoch, positions, Purpose.GAUSSIAN_BLUR, count=2)
    sigma = _SIGMA[0] + blur[:, 1] * (_SIGMA[1] - _SIGMA[0])
    return ColorParams(
        order=draws[:, 5 : 5 + num_places].argsort(axis=1),
        factors=np.where(jittered, low + draws[:, 1:5] * (high - low), [1, 1, 1, 0]),
        gray=uniforms(seed, epoch, positions, Purpose.GRAYSCALE, count=1)[:, 0]
        < spec.grayscale_prob,
        sigma=np.where(blur[:, 0] < spec.gaussian_blur_prob, sigma, 0.0),
        solarized=uniforms(seed, epoch, positions, Purpose.SOLARIZE, count=1)[:, 0]
        < spec.solarize_prob,
    )


def apply_color(images: Tensor, params: ColorParams) -> Tensor:
    """Return uint8 [B, H, W, 3] with `params` applied: jitter, greyscale, blur, solarize."""
    pixels = images.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    for taken in params.order.T:
        _jitter(pixels, taken, params.factors)
    if params.gray.any():
        kept = np.where(params.gray, 0.0, 1.0)
        _blend(pixels, kept, np.full(len(kept), SATURATION))
    rows = np.flatnonzero(params.sigma)
    if len(rows):
        index = to_device(rows, images.device)
        pixels.index_copy_(1, index, _blur(pixels.index_select(1, index), params.sigma[rows]))
    levels = pixels.round_().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    if params.solarized.any():
        chosen = to_device(params.solarized, images.device)[:, None, None, None]
        levels = torch.where(chosen & (levels >= _SOLARIZE_FROM), 255 - levels, levels)
    return levels


# From here on, `pixels` are float32 [3, B, H, W], levels of 0 to 255: a plane a channel.


def _jitter(pixels: Tensor, taken: NDArray[np.int64], factors: NDArray[np.float64]) -> None:
    """Apply to each image the operation that it takes now, `taken` [B], in place."""
    chosen = np.take_along_axis(factors, taken[:, None], 1)[:, 0]
    scales = np.where(taken == HUE, 1.0, chosen)
    if (scales != 1).any():
        _blend(pixels, scales, taken)
    rows = np.flatnonzero((taken == HUE) & (chosen != 0))
    if len(rows):
        index = to_device(rows, pixels.device)
        pixels.index_copy_(1, index, _turn_hue(pixels.index_select(1, index), chosen[rows]))


def _blend(pixels: Tensor, factor: NDArray[np.float64], taken: NDArray[np.int64]) -> None:
    """Make it factor · pixels + (1 - factor) · what the operation `taken` would fade to.

    That is black for brightness, the image's mean grey for contrast, and its grey for saturation.
    """
    table = [factor, (1 - factor) * (taken == CONTRAST), (1 - factor) * (taken == SATURATION)]
    columns = to_device(np.stack(table).astype(np.float32), pixels.device)
    scale, of_mean, of_gray = columns[..., None, None].unbind()
    gray = _luma(pixels)
    added = of_mean * _mean(gray)[:, None, None] + of_gray * gray
    pixels.mul_(scale).add_(added).clamp_(0, 255)


def _luma(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind()
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _mean(gray: Tensor) -> Tensor:
    """Return float32 [B], the mean of [B, H, W], summed exactly."""
    steps = (gray * _FIXED_POINT).round_().to(torch.int32)
    total = steps.sum(dim=(1, 2), dtype=torch.int64).double()
    return (total / (_FIXED_POINT * gray[0].numel())).float()


def _turn_hue(pixels: Tensor, turns: NDArray[np.float64]) -> Tensor:
    """Return `pixels` with hues moved by so many `turns` [B] of the colour circle.

    A channel is at its height in two of the hexagon's six sectors, at its depth in two, and on a
    straight line between them.
    """
    red, green, blue = pixels.unbind()
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    width = torch.where(chroma > 0, chroma, 1.0)  # grey has no hue, and keeps its zero chroma
    hue = torch.where(high == green, 2 + (blue - red) / width, 4 + (red - green) / width)
    hue = torch.where(high == red, (green - blue) / width, hue)
    hue += to_device((6 * turns).astype(np.float32), pixels.device)[:, None, None]
    turned = torch.empty_like(pixels)
    for channel, middle in enumerate((0, 2, 4)):
        away = hue - middle
        away = (away - 6 * (away / 6).round_()).abs_()  # from the middle, the shorter way round
        turned[channel] = high - chroma * away.sub_(1).clamp_(0, 1)
    return turned


def _blur(pixels: Tensor, sigma: NDArray[np.float64]) -> Tensor:
    """Return `pixels` blurred by Gaussians of deviation `sigma` [B], downwards and across."""
    for dim in (2, 3):
        pixels = _blur_along(pixels, sigma, dim)
    return pixels


def _blur_along(pixels: Tensor, sigma: NDArray[np.float64], dim: int) -> Tensor:
    """Blur along one dimension, mirrored at its ends.

    Plain sums, for a library's convolution may add up differently in another batch.
    """
    side = pixels.shape[dim]
    reach = min(_REACH, side - 1)
    kernel = np.exp(-0.5 * (np.arange(reach + 1) / sigma[:, None]) ** 2)
    kernel /= 2 * kernel.sum(axis=1, keepdims=True) - 1  # both sides, with the middle once
    weights = to_device(kernel.T.astype(np.float32), pixels.device)[..., None, None]
    places = np.abs(np.arange(-reach, side + reach))
    places = np.where(places < side, places, 2 * (side - 1) - places)
    wide = pixels.index_select(dim, to_device(places, pixels.device))
    blurred = weights[0] * pixels
    for step in range(1, reach + 1):
        before = wide.narrow(dim, reach - step, side)
        after = wide.narrow(dim, reach + step, side)
        blurred += (before + after).mul_(weights[step])
    return blurred
