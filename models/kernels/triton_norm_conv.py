"""The depthwise convolutions of TransXNet's MS-FFN, with GELU and normalisation before them, on a
GPU: kernels of all sizes in one pass each way.

Shapes: B batch, H×W grid, C channels; maps are channels-last.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .choice import FASTER
from .device.mixed_conv import (
    activated_gradient_kernel,
    mixed_conv_gradients_kernel,
    mixed_conv_kernel,
)
from .eager import LIBRARY, full_precision
from .eager_depthwise import add_identity
from .eager_norm import (
    WIDEST_MIXED,
    Group,
    Line,
    Normed,
    batch_line,
    one_size,
    own_sizes,
    with_statistics,
)
from .launch import launch

SIDES = (1, 3, 5, WIDEST_MIXED)
TAPS = WIDEST_MIXED**2
# Rows of a strip.
ROWS, GRADIENT_ROWS = 7, 2
# Pixels that a program of the backward pass sums up over at least, while there are as many.
SUMMED = 1024
BLOCK = 32
# What is computed point by point goes by tiles.
TILE_PIXELS, TILE_CHANNELS = 32, 64


class _GeluNormConv(torch.autograd.Function):
    """`mixed_conv` of the normalised GELU; saves its inputs and the batch's statistics alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        eps: float,
        group: Group,
        bias: Tensor,
        *weights: Tensor,
    ) -> Normed:
        norm, unbiased = batch_line(F.gelu(x), gain, shift, eps, group)
        ctx.save_for_backward(x, *norm, *weights)
        ctx.group = group
        out = mixed_conv(x, _normalisation(norm), _kernels(weights), bias, _ends(weights))
        return with_statistics(ctx, out, norm.mean, unbiased)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        split = len(Line._fields)
        norm, weights = Line(*rest[:split]), rest[split:]
        with full_precision(x):
            line, kernels = _normalisation(norm), _kernels(weights)
            grad, grad_kernels, sums = mixed_conv_gradients(
                grads[0], x, line, kernels, _ends(weights)
            )
            grad_bias, grad_shift, products = sums.unbind()
            slope, offset = norm.through_statistics(products, grad_shift, ctx.group)
            through = torch.stack([norm.scale, slope, offset])
            grad_x = activated_gradient(grad, x, through)
            grad_weights = own_sizes(grad_kernels.permute(2, 0, 1)[:, None], weights)
        return grad_x, products * norm.inverse, grad_shift, None, None, grad_bias, *grad_weights


@torch.library.custom_op(f"{LIBRARY}::mixed_conv", mutates_args=())
def mixed_conv(
    x: Tensor, line: Tensor, weight: Tensor, bias: Tensor, ends: Sequence[int]
) -> Tensor:
    """Depthwise convolution of y = (GELU(x) - mean) * scale + shift by kernels of several sizes.

    x [B, H, W, C]; line [3, C]: mean, scale and shift; weight [7, 7, C], zeros around smaller
    kernels; bias [C]; `ends`: where the channels with kernels of side 1, 3 and 5 end.
    """
    x = x.contiguous()
    out = x.new_empty(x.shape)
    strips = len(x) * -(-x.shape[1] // ROWS)
    launch(
        mixed_conv_kernel, (strips, _blocks(ends, x.shape[-1])),
        x, line, weight.contiguous(), bias, out, *x.shape[1:], *ends,
        ROWS=ROWS, BLOCK=BLOCK, num_warps=BLOCK // 32,
    )  # fmt: skip
    return out


@torch.library.custom_op(f"{LIBRARY}::mixed_conv_gradients", mutates_args=())
def mixed_conv_gradients(
    grad: Tensor, x: Tensor, line: Tensor, weight: Tensor, ends: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `mixed_conv`'s y [B, H, W, C] and weight [7, 7, C], and three sums [3, C].

    These are the gradient of the bias, and the gradient of y, summed, and summed times GELU(x) less
    its mean.
    """
    grad, x = grad.contiguous(), x.contiguous()
    grad_y = x.new_empty(x.shape)
    strips = len(x) * -(-x.shape[1] // GRADIENT_ROWS)
    span = -(-SUMMED // (GRADIENT_ROWS * x.shape[2]))
    parts = -(-strips // span)
    sums = x.new_empty(parts, TAPS + 3, x.shape[-1], dtype=torch.float32)
    launch(
        mixed_conv_gradients_kernel, (parts, _blocks(ends, x.shape[-1])),
        grad, x, line, weight.contiguous(), grad_y, sums, *x.shape[1:], *ends, strips, span,
        ROWS=GRADIENT_ROWS, BLOCK=BLOCK, num_warps=BLOCK // 32,
    )  # fmt: skip
    # Added up in one order whatever the order of the programs.
    return grad_y, sums[:, :TAPS].sum(dim=0).view(weight.shape), sums[:, TAPS:].sum(dim=0)


@torch.library.custom_op(f"{LIBRARY}::activated_gradient", mutates_args=())
def activated_gradient(grad: Tensor, x: Tensor, line: Tensor) -> Tensor:
    """The gradient of x where that of GELU(x) is `grad * scale + GELU(x) * slope + offset`.

    grad and x [B, H, W, C]; line [3, C]: scale, slope and offset.
    """
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = x.new_empty(x.shape)
    pixels, channels = x.numel() // x.shape[-1], x.shape[-1]
    launch(
        activated_gradient_kernel,
        (-(-pixels // TILE_PIXELS), -(-channels // TILE_CHANNELS)),
        grad, x, line, grad_x, pixels, channels,
        PIXELS=TILE_PIXELS, BLOCK=TILE_CHANNELS, num_warps=4,
    )  # fmt: skip
    return grad_x


@mixed_conv.register_fake
def _mixed_conv_shape(
    x: Tensor, line: Tensor, weight: Tensor, bias: Tensor, ends: Sequence[int]
) -> Tensor:
    return x.new_empty(x.shape)


@mixed_conv_gradients.register_fake
def _mixed_conv_gradient_shapes(
    grad: Tensor, x: Tensor, line: Tensor, weight: Tensor, ends: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), line.new_empty(weight.shape), line.new_empty(line.shape)


@activated_gradient.register_fake
def _activated_gradient_shape(grad: Tensor, x: Tensor, line: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula(getattr(torch.ops, LIBRARY).mixed_conv)
def _mixed_conv_flops(
    x_shape: Sequence[int], line: Any, weight: Any, bias: Any, ends: Sequence[int], **_: Any
) -> int:
    return _flops(x_shape, ends)


@register_flop_formula(getattr(torch.ops, LIBRARY).mixed_conv_gradients)
def _mixed_conv_gradient_flops(
    grad: Any, x_shape: Sequence[int], line: Any, weight: Any, ends: Sequence[int], **_: Any
) -> int:
    """The gradients of the map and of the kernels."""
    return 2 * _flops(x_shape, ends)


def _flops(shape: Sequence[int], ends: Sequence[int]) -> int:
    widths = (end - start for start, end in pairwise((0, *ends, shape[-1])))
    taps = sum(width * side**2 for width, side in zip(widths, SIDES, strict=True))
    return 2 * taps * prod(shape[:-1])


def _normalisation(norm: Line) -> Tensor:
    return torch.stack([norm.mean, norm.scale, norm.shift])


def _kernels(weights: Sequence[Tensor]) -> Tensor:
    """All kernels as [7, 7, C], what is convolved itself added to each."""
    kernels = one_size(weights)
    kernels = add_identity(kernels, torch.ones_like(kernels[:, 0, 0, 0]))
    margin = (WIDEST_MIXED - kernels.shape[-1]) // 2
    return F.pad(kernels, (margin,) * 4)[:, 0].permute(1, 2, 0).contiguous()


def _ends(weights: Sequence[Tensor]) -> list[int]:
    """Where the channels with kernels of side 1, 3 and 5 end; kernels are in rising order."""
    return [sum(len(w) for w in weights if w.shape[-1] <= side) for side in SIDES[:-1]]


def _blocks(ends: Sequence[int], channels: int) -> int:
    """How many blocks of channels there are, each with kernels of one size."""
    return sum(-(-(end - start) // BLOCK) for start, end in pairwise((0, *ends, channels)))


FASTER["gelu_norm_conv"] = _GeluNormConv
