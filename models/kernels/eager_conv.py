"""The definition of every convolution, in plain PyTorch; any faster form is judged by it.

Shapes: B batch, H×W grid, C and D channels, K the side of a kernel; maps are channels-last.
"""

from torch import Tensor
from torch.nn import functional as F


def dynamic_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution with a kernel of its own for every sample, "same" padding.

    x [B, H, W, C], weight [B, K, K, C], bias [B, C]. Returns [B, H, W, C].
    """
    batch, height, width, channels = x.shape
    side = weight.shape[1]
    out = F.conv2d(
        x.permute(0, 3, 1, 2).reshape(1, batch * channels, height, width),
        weight.permute(0, 3, 1, 2).reshape(batch * channels, 1, side, side),
        bias.flatten(),
        padding=side // 2,
        groups=batch * channels,
    )
    return out.view(batch, channels, height, width).permute(0, 2, 3, 1)


def conv_glu(gate: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`GELU(depthwise 3x3 convolution of gate) * value`, the core of TransNeXt's ConvGLU.

    gate and value [B, H, W, D], weight [D, 1, 3, 3], bias [D]. Returns [B, H, W, D].
    """
    return F.gelu(depthwise_conv(gate, weight, bias)) * value


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1) -> Tensor:
    """Depthwise convolution of `x` [B, H, W, C] by `weight` [C, 1, k, k], "same" padding."""
    out = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight,
        bias,
        stride=stride,
        padding=weight.shape[-1] // 2,
        groups=x.shape[-1],
    )
    return out.permute(0, 2, 3, 1)
