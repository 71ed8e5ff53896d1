"""Depthwise convolutions, in plain PyTorch; any faster form is judged by it.

Shapes: B batch, H×W grid, C channels, K the (odd) side of a kernel; maps are channels-last.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from .choice import exporting, faster
from .eager import LIBRARY, full_precision, wide_dtype
from .exported import tap_sum

# On the CPU the weight gradient of a kernel wider than this costs ten times its arithmetic:
# oneDNN has no depthwise form of it and pads every channel to sixteen.
WIDEST = 3


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1) -> Tensor:
    """Depthwise convolution of `x` [B, H, W, C] by `weight` [C, 1, K, K], "same" padding."""
    if stride > 1 or weight.shape[-1] <= WIDEST or x.device.type != "cpu":
        return same_conv(x, weight, bias, stride=stride)
    dtype = compute_dtype(x)
    with full_precision(x):
        parameters = weight.to(dtype), None if bias is None else bias.to(dtype)
        out: Tensor = _Wide.apply(x.to(dtype), *parameters)
    return out


def dynamic_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution with a kernel of its own for every sample, "same" padding.

    x [B, H, W, C], weight [B, K, K, C], bias [B, C]. Returns [B, H, W, C].
    """
    if exporting():
        return tap_sum(x, weight, bias)
    fused = faster("dynamic_conv", x)
    if fused is not None:
        dtype = compute_dtype(x)
        with full_precision(x):
            near: Tensor = fused.apply(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return near
    batch, height, width, channels = x.shape
    side = weight.shape[1]
    # One image whose channels are all samples' channels.
    image = x.permute(1, 2, 0, 3).reshape(1, height, width, batch * channels)
    kernels = weight.permute(0, 3, 1, 2).reshape(batch * channels, 1, side, side)
    out = depthwise_conv(image, kernels, bias.flatten())
    return out.view(height, width, batch, channels).permute(2, 0, 1, 3)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions and products of `x` are computed here and now."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def same_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1) -> Tensor:
    """`depthwise_conv` with torch's own gradients."""
    out = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight,
        bias,
        stride=stride,
        padding=weight.shape[-1] // 2,
        groups=x.shape[-1],
    )
    return out.permute(0, 2, 3, 1)


def scaled_residual_conv(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """`scale * x + conv(x)`, without gradients.

    x [B, H, W, C], weight [C, 1, K, K], bias and scale [C], these at least float32.
    """
    if identity_fits(x, weight):
        return same_conv(x, add_identity(weight, scale), bias)
    out = same_conv(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return out.addcmul_(x, scale)


def identity_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether adding 1 to a kernel of `x` costs no bits that the sum `x + conv(x)` would keep.

    Other devices than the CPU may multiply float32 with fewer bits.
    """
    wide = weight.dtype in (torch.float32, torch.float64)
    return wide and x.device.type == "cpu" and compute_dtype(x) == weight.dtype


def add_identity(weight: Tensor, scale: Tensor) -> Tensor:
    """The kernels [C, 1, K, K] of `scale * x + conv(x)`."""
    return weight + F.pad(scale[:, None, None, None], (weight.shape[-1] // 2,) * 4)


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return same_conv(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_bias = grad.sum(dim=(0, 1, 2)) if ctx.needs_input_grad[2] else None
        with full_precision(x):
            grad_x = input_gradient(grad, weight)
            return grad_x, weight_gradient(x, grad, side=weight.shape[-1]), grad_bias


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient [B, H, W, C] of the input of a depthwise convolution of stride 1."""
    return same_conv(grad, weight.flip(2, 3), None)


def weight_gradient(x: Tensor, grad: Tensor, *, side: int) -> Tensor:
    """The gradient [C, 1, side, side] of the weight of a depthwise convolution of stride 1.

    x and grad [B, H, W, C].
    """
    if side == 1:
        return (x * grad).sum(dim=(0, 1, 2)).view(-1, 1, 1, 1)
    if side <= WIDEST or x.device.type != "cpu":
        return _narrow_gradient(x, grad, (side, side))
    out: Tensor = _wide_gradient(x, grad, side)
    return out


# Operators to the compiler, which would copy every shifted map, and rearrange maps for convolutions
# so that their channels come first.
@torch.library.custom_op(f"{LIBRARY}::conv_gradients", mutates_args=())
def conv_gradients(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias of a depthwise convolution of stride 1, at once.

    x and grad [B, H, W, C], weight [C, 1, K, K], all of one dtype, the gradients' as well.
    """
    planes, grads = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    margin = (weight.shape[-1] // 2,) * 2
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grads, planes, weight, [len(weight)], (1, 1), margin, (1, 1), False, (0, 0), len(weight),
        (True, True, True),
    )  # fmt: skip
    return grad_x.permute(0, 2, 3, 1).contiguous(), grad_weight, grad_bias


@conv_gradients.register_fake
def _conv_gradient_shapes(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


@torch.library.custom_op(f"{LIBRARY}::wide_gradient", mutates_args=())
def _wide_gradient(x: Tensor, grad: Tensor, side: int) -> Tensor:
    """`weight_gradient` of kernels too wide for the CPU, three columns at a time.

    The gradient of columns near o is that of a narrow kernel on the map shifted by o. With enough
    zeros between its rows a map is shifted by moving where it begins, without a copy.
    """
    batch, height, width, channels = x.shape
    reach = side // 2
    slack = reach - 1
    row = width + reach
    size = batch * height * row
    grad = _fill(grad.new_empty(batch, height, row, channels), grad)
    pixels = x.new_empty(slack + size + reach, channels)
    pixels[:slack] = pixels[slack + size :] = 0
    _fill(pixels[slack : slack + size].view(grad.shape), x)
    columns: list[Tensor] = []
    for first in range(0, side, 3):
        last = side - first == 1  # a column by itself is cheaper than three of which two are there
        start = first - 1 if last else min(first, side - 3)
        shifted = pixels[start : start + size].view(grad.shape)
        part = _narrow_gradient(shifted, grad, (side, 1 if last else 3))
        columns.append(part if last else part[..., first - start :])
    return torch.cat(columns, dim=-1)


def _fill(rows: Tensor, x: Tensor) -> Tensor:
    """Write the map `x` into a wider one, one column from the left, and zeros around it."""
    end = x.shape[2] + 1
    rows[:, :, 0] = rows[:, :, end:] = 0
    rows[:, :, 1:end] = x
    return rows


@_wide_gradient.register_fake
def _wide_gradient_shape(x: Tensor, grad: Tensor, side: int) -> Tensor:
    return x.new_empty(x.shape[-1], 1, side, side)


def tap_sums(grad: Tensor, *, side: int) -> Tensor:
    """`weight_gradient` [C, 1, side, side] on a map of ones, at least in float32.

    At each tap the sum of `grad` [B, H, W, C] over the pixels whose neighbour there is in the map.
    """
    image = grad.sum(dim=0, dtype=wide_dtype(grad))
    rows, columns = (_neighbours_inside(size, side, like=image) for size in image.shape[:2])
    return torch.einsum("kh,hwc,lw->ckl", rows, image, columns)[:, None]


def sums_inside(weight: Tensor, size: Sequence[int]) -> Tensor:
    """`depthwise_conv` [H, W, C] of a map of ones by `weight` [C, 1, K, K]."""
    rows, columns = (_neighbours_inside(side, weight.shape[-1], like=weight) for side in size)
    return columns.t() @ torch.einsum("kh,ckl->hlc", rows, weight[:, 0]).contiguous()


def _neighbours_inside(size: int, side: int, *, like: Tensor) -> Tensor:
    """Whether (1 or 0) the neighbour at each tap of each place of a row is in the row too.

    [side, size], in the dtype of `like`.
    """
    taps = torch.arange(side, device=like.device)[:, None] - side // 2
    neighbours = taps + torch.arange(size, device=like.device)
    return ((neighbours >= 0) & (neighbours < size)).to(like.dtype)


def _narrow_gradient(x: Tensor, grad: Tensor, shape: tuple[int, int]) -> Tensor:
    weight_grad: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]  # unannotated in torch
        x.permute(0, 3, 1, 2),
        (x.shape[-1], 1, *shape),
        grad.permute(0, 3, 1, 2),
        padding=(shape[0] // 2, shape[1] // 2),
        groups=x.shape[-1],
    )
    return weight_grad
