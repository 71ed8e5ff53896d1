"""Evaluation without batch norms: their statistics folded into the convolutions beside them.

Invariant: the folded model computes what the model computes in evaluation, at every input size.
"""

from copy import deepcopy
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from .base import Backbone, ModelError
from .layers import BatchNorm, LayerScale
from .transxnet import ConvBN, FeedForward, Mixer


class Folded(nn.Module):
    """The place of a batch norm whose work a neighbour does; it has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def scaled(self, x: Tensor, scale: LayerScale) -> Tensor:
        """`scale(x)`; see `BatchNorm.scaled`."""
        out: Tensor = scale(x)
        return out

    def train(self, mode: bool = True) -> Self:
        """Accept evaluation alone.

        Raises:
            ModelError: in training, which would need the batch norm back.
        """
        return self._refuse() if mode else self

    def _refuse(self) -> NoReturn:
        raise ModelError(
            "this model's batch norms are folded into its convolutions, so it cannot be trained: "
            "train the model that it was made from"
        )


def fold_batch_norm(model: Backbone) -> Backbone:
    """A copy of `model`, for evaluation, with every batch norm folded that can be.

    One that follows a convolution or linear layer is folded into that one; one between a GELU and
    a 1x1 convolution into the latter. What remains is the norm before the multi-scale convolution
    of TransXNet's feed-forward network, one a block: its shift reaches no further than the image,
    while a convolution's bias would also stand for the zeros around it. Works on meta tensors, so
    that weights folded elsewhere can be loaded into the result.
    """
    folded = deepcopy(model).eval()
    with torch.no_grad():
        for module in folded.modules():
            if isinstance(module, ConvBN):
                _fold_back(module.bn, module.conv)
                module.bn = Folded()  # type: ignore[assignment]  # the same interface
            elif isinstance(module, FeedForward):
                _fold_forward(module.norm, module.fc2[0])
                _fold_back(module.fc2[1], module.fc2[0])
                module.norm = module.fc2[1] = Folded()  # type: ignore[assignment]  # likewise
            elif isinstance(module, Mixer):
                _fold_squeeze(module.proj)
    return folded


def _fold_squeeze(proj: nn.Sequential) -> None:
    """Conv, GELU, norm, linear, GELU, norm, linear, norm."""
    for norm, linear in ((2, 3), (5, 6)):
        _fold_forward(proj[norm], proj[linear])
    _fold_back(proj[7], proj[6])
    for place in (2, 5, 7):
        proj[place] = Folded()


def _fold_back(norm: Any, conv: Any) -> None:
    """Let the convolution before a norm do its work."""
    gain, shift = _line(norm)
    bias = 0 if conv.bias is None else conv.bias.double()
    _assign(conv, conv.weight.double() * gain[:, None, None, None], bias * gain + shift)


def _fold_forward(norm: Any, linear: Any) -> None:
    """Let the 1x1 convolution after a norm do its work."""
    gain, shift = _line(norm)
    weight = linear.weight.double()
    bias = weight.flatten(1) @ shift
    if linear.bias is not None:
        bias = bias + linear.bias.double()
    _assign(linear, weight * gain[:, None, None], bias)


def _line(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The norm in evaluation as gain and shift [C], float64."""
    gain = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return gain, norm.bias.double() - norm.running_mean.double() * gain


def _assign(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype))
    conv.bias = nn.Parameter(bias.to(dtype))
