"""TransXNet's dynamic convolution on a GPU: one pass each way.

Shapes: B batch, H×W grid, C channels, K the (odd) side of a kernel; maps are channels-last.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .choice import FASTER
from .device.dynamic_conv import dynamic_conv_gradients_kernel, dynamic_conv_kernel
from .eager import LIBRARY
from .launch import launch

# Rows of a strip. A map's sides at 224 pixels are multiples of both, but for the last stage's 7.
ROWS, LOW_ROWS = 14, 7
GRADIENT_ROWS = 4
# Strips that a program sums up over, and so how few partial sums there are to write.
GRADIENT_STRIPS = 4
BLOCK = 32


class _DynamicConv(torch.autograd.Function):
    """`convolve_each`; saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = convolve_each(x, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = convolve_each_gradients(grads[0], *ctx.saved_tensors)
        return gradients


@torch.library.custom_op(f"{LIBRARY}::convolve_each", mutates_args=())
def convolve_each(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution with a kernel of its own for every sample, "same" padding.

    x [B, H, W, C], weight [B, K, K, C], bias [B, C]. Returns [B, H, W, C].
    """
    x, pitch = _pitched(x)
    batch, height, _, channels = x.shape
    rows = ROWS if height > LOW_ROWS else LOW_ROWS
    out = x.new_empty(x.shape)
    launch(
        dynamic_conv_kernel, (batch * -(-height // rows), -(-channels // BLOCK)),
        x, weight.contiguous(), bias.contiguous(), out, *x.shape[1:], pitch,
        SIDE=weight.shape[1], ROWS=rows, BLOCK=BLOCK, num_warps=BLOCK // 32,
    )  # fmt: skip
    return out


@torch.library.custom_op(f"{LIBRARY}::convolve_each_gradients", mutates_args=())
def convolve_each_gradients(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `convolve_each`'s map, weight and bias."""
    (grad, grad_pitch), (x, pitch) = _pitched(grad), _pitched(x)
    batch, height, _, channels = x.shape
    taps = weight.shape[1] ** 2
    grad_x = x.new_empty(x.shape)
    parts = -(-height // (GRADIENT_ROWS * GRADIENT_STRIPS))
    sums = x.new_empty(batch, parts, taps + 1, channels, dtype=torch.float32)
    launch(
        dynamic_conv_gradients_kernel, (batch * parts, -(-channels // BLOCK)),
        grad, x, weight.contiguous(), grad_x, sums, *x.shape[1:], grad_pitch, pitch,
        SIDE=weight.shape[1], ROWS=GRADIENT_ROWS, STRIPS=GRADIENT_STRIPS, BLOCK=BLOCK,
        num_warps=BLOCK // 32,
    )  # fmt: skip
    # Added up in one order whatever the order of the programs.
    grad_weight, grad_bias = (
        part.sum(dim=1).to(weight.dtype) for part in (sums[:, :, :taps], sums[:, :, taps])
    )
    return grad_x, grad_weight.view(weight.shape), grad_bias


@convolve_each.register_fake
def _convolve_each_shape(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@convolve_each_gradients.register_fake
def _convolve_each_gradient_shapes(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    bias = weight.new_empty(len(weight), weight.shape[-1])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias


@register_flop_formula(getattr(torch.ops, LIBRARY).convolve_each)
def _convolve_each_flops(
    x_shape: torch.Size, weight_shape: torch.Size, *shapes: Any, **_: Any
) -> int:
    return 2 * weight_shape[1] ** 2 * x_shape.numel()


@register_flop_formula(getattr(torch.ops, LIBRARY).convolve_each_gradients)
def _convolve_each_gradient_flops(
    grad_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, **_: Any
) -> int:
    """The gradients of the map and of the kernels."""
    return 2 * 2 * weight_shape[1] ** 2 * x_shape.numel()


def _pitched(x: Tensor) -> tuple[Tensor, int]:
    """A map as kernels read it, and how many numbers apart its pixels are.

    Some of the channels of a map are read where they are; what has other gaps is copied.
    """
    _, height, width, channels = x.shape
    pitch = x.stride(2)
    if x.stride() == (height * width * pitch, width * pitch, pitch, 1):
        return x, pitch
    return x.contiguous(), channels


FASTER["dynamic_conv"] = _DynamicConv
