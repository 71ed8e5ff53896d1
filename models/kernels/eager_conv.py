"""The definition of TransNeXt's gated convolution, in plain PyTorch.

Shapes: B batch, H×W grid, C and D channels, K the side of a kernel; maps are channels-last.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import form
from .eager import full_precision
from .eager_depthwise import conv_gradients, depthwise_conv


def conv_glu(
    gate: Tensor,
    value: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """`linear(GELU(depthwise 3x3 convolution of gate) * value)`, the core of TransNeXt's ConvGLU.

    gate and value [B, H, W, D], conv_weight [D, 1, 3, 3], conv_bias [D], weight [C, D], bias [C].
    Returns [B, H, W, C]. Saves its inputs alone: the rest is computed again in the backward pass.
    """
    parameters = (parameter.to(gate.dtype) for parameter in (conv_weight, conv_bias, weight, bias))
    with full_precision(gate):
        out: Tensor = form("conv_glu", _ConvGLU, gate).apply(gate, value, *parameters)
    return out


class _ConvGLU(torch.autograd.Function):
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
        hidden = F.gelu(depthwise_conv(gate, conv_weight, conv_bias)).mul_(value)
        return F.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, value, conv_weight, conv_bias, weight = ctx.saved_tensors
        (grad,) = grads
        with full_precision(gate):
            conv = depthwise_conv(gate, conv_weight, conv_bias)
            active = F.gelu(conv)
            rows = grad.flatten(0, -2)
            grad_weight = rows.t() @ (active * value).flatten(0, -2)
            grad_hidden = grad @ weight
            grad_value = active.mul_(grad_hidden)
            grad_conv = torch.ops.aten.gelu_backward(grad_hidden.mul_(value), conv)
            grad_gate, *grad_parameters = conv_gradients(gate, grad_conv, conv_weight)
        return grad_gate, grad_value, *grad_parameters, grad_weight, rows.sum(dim=0)
