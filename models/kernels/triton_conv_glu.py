"""The gated convolution of TransNeXt's ConvGLU on a GPU: one pass each way.

Shapes: B batch, H×W grid, D channels; maps are channels-last.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .choice import FASTER
from .device.conv_glu import gated_conv_gradients_kernel, gated_conv_kernel
from .eager import LIBRARY, full_precision
from .launch import launch

# Rows of a strip. Forward, (ROWS + 2) / ROWS of the gate are loaded; backward, (ROWS + 4) / ROWS.
ROWS = 4
BLOCK = 128


class _ConvGLU(torch.autograd.Function):
    """`linear(gated_conv(...))`; saves its inputs alone."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        value: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(gate, value, conv_weight, conv_bias, weight)
        return F.linear(gated_conv(gate, value, conv_weight, conv_bias), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *inputs, weight = ctx.saved_tensors
        (grad,) = grads
        with full_precision(grad):
            rows = grad.flatten(0, -2)
            hidden, *grad_inputs = gated_conv_gradients(grad @ weight, *inputs)
            grad_weight = rows.t() @ hidden.flatten(0, -2)
        return *grad_inputs, grad_weight, rows.sum(dim=0)


@torch.library.custom_op(f"{LIBRARY}::gated_conv", mutates_args=())
def gated_conv(gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`GELU(conv(gate)) * value` [B, H, W, D], the convolution 3x3 and depthwise.

    gate and value [B, H, W, D], weight [D, 1, 3, 3], bias [D].
    """
    gate, value = gate.contiguous(), value.contiguous()
    out = torch.empty_like(value)
    launch(
        gated_conv_kernel, _grid(gate), gate, value, weight.contiguous(), bias,
        out, *gate.shape[1:],
        ROWS=ROWS, BLOCK=BLOCK, num_warps=BLOCK // 32,
    )  # fmt: skip
    return out


@torch.library.custom_op(f"{LIBRARY}::gated_conv_gradients", mutates_args=())
def gated_conv_gradients(
    grad: Tensor, gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `gated_conv` returned, and the gradients of its gate, value, weight and bias."""
    grad, gate, value = grad.contiguous(), gate.contiguous(), value.contiguous()
    out, grad_gate, grad_value = (torch.empty_like(value) for _ in range(3))
    grid = _grid(gate)
    # Each strip's sums, added up in one order whatever the order of the programs.
    sums = gate.new_empty(grid[0], 10, gate.shape[-1], dtype=torch.float32)
    launch(
        gated_conv_gradients_kernel, grid, grad, gate, value, weight.contiguous(), bias,
        out, grad_gate, grad_value, sums, *gate.shape[1:],
        ROWS=ROWS, BLOCK=BLOCK, num_warps=BLOCK // 32,
    )  # fmt: skip
    total = sums.sum(dim=0).to(weight.dtype)
    grad_weight = total[:9].t().reshape(weight.shape)
    return out, grad_gate, grad_value, grad_weight.contiguous(), total[9].clone()


@gated_conv.register_fake
def _gated_conv_shape(gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return value.new_empty(value.shape)


@gated_conv_gradients.register_fake
def _gated_conv_gradient_shapes(
    grad: Tensor, gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out, grad_gate, grad_value = (value.new_empty(value.shape) for _ in range(3))
    return out, grad_gate, grad_value, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@register_flop_formula(getattr(torch.ops, LIBRARY).gated_conv)
def _gated_conv_flops(gate_shape: torch.Size, *shapes: Any, **_: Any) -> int:
    return 2 * 9 * gate_shape.numel()


@register_flop_formula(getattr(torch.ops, LIBRARY).gated_conv_gradients)
def _gated_conv_gradient_flops(grad_shape: torch.Size, *shapes: Any, **_: Any) -> int:
    """The convolution again, and the gradients of its input and of its weight."""
    return 3 * 2 * 9 * grad_shape.numel()


def _grid(gate: Tensor) -> tuple[int, int]:
    """The programs: strips, and blocks of channels."""
    batch, height, _, channels = gate.shape
    return batch * -(-height // ROWS), -(-channels // BLOCK)


FASTER["conv_glu"] = _ConvGLU
