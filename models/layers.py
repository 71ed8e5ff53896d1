"""Layers both families share, on channels-last maps [B, H, W, C].

Invariant: no layer draws random numbers, and no statistic moves except as `BatchNorm` says.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .base import ModelError
from .kernels import (
    batch_norm,
    depthwise_conv,
    gelu_norm_conv,
    gelu_norm_linear,
    group_norm,
)
from .kernels.eager import widen
from .kernels.eager_depthwise import add_identity, identity_fits
from .kernels.eager_norm import Normed


def drop_path(x: Tensor, keep: Tensor | None) -> Tensor:
    """Multiply a residual branch [B, ...] by its samples' `keep` [B] (0, or above 1), if any."""
    return x if keep is None else x * keep.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def add_branch(x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """`x + drop_path(branch, keep)` of maps, in one pass."""
    if keep is None:
        return x + branch
    return torch.addcmul(x, branch, keep.to(branch.dtype)[:, None, None, None])


class Conv(nn.Conv2d):
    """A dense convolution [B, H, W, C] -> [B, H', W', C'] with half-kernel padding."""

    def __init__(
        self, channels: int, width: int, kernel: int, *, stride: int, bias: bool = True
    ) -> None:
        super().__init__(channels, width, kernel, stride, kernel // 2, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve a map."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution [B, H, W, C] -> [B, H, W, C'], computed as a linear layer."""

    def __init__(self, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__(channels, width, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Mix the channels of a map."""
        return F.linear(input, self.weight.flatten(1), self.bias)


class Depthwise(nn.Conv2d):
    """A depthwise convolution [B, H, W, C] -> [B, H', W', C]; 1x1 kernels just multiply."""

    def __init__(self, width: int, kernel: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(width, width, kernel, stride, kernel // 2, groups=width, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve each channel of a map."""
        if self.kernel_size == (1, 1):
            scaled = input * self.weight.flatten()
            return scaled if self.bias is None else scaled + self.bias
        return depthwise_conv(input, self.weight, self.bias, stride=self.stride[0])

    def residual(self, input: Tensor) -> Tensor:
        """`input + self(input)`, in one pass where that costs no bits."""
        if not identity_fits(input, self.weight):
            out: Tensor = self(input)
            return input + out
        weight = add_identity(self.weight, torch.ones_like(self.weight[:, 0, 0, 0]))
        return depthwise_conv(input, weight, self.bias)


class LayerScale(Depthwise):
    """A gain and a bias a channel, shaped like the official depthwise 1x1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)

    def onto(self, total: Tensor, x: Tensor) -> Tensor:
        """`total + gain * x`, for a total that the bias is in already."""
        return torch.addcmul(total, x, self.weight.flatten().to(x.dtype))


class MultiScaleConv(nn.Module):
    """Depthwise convolutions of four sizes, each over a quarter of the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        quarter = width // 4
        self.widths = [width - 3 * quarter, quarter, quarter, quarter]
        self.proj = nn.ModuleList(
            Depthwise(part, kernel) for part, kernel in zip(self.widths, (1, 3, 5, 7), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, E] -> [B, H, W, E]."""
        parts = zip(self.proj, torch.split(x, self.widths, dim=-1), strict=True)
        return torch.cat([conv(part) for conv, part in parts], dim=-1)


class GroupNorm(nn.GroupNorm):
    """Normalisation of each sample over all of H, W and C, with one gain and bias a channel."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a map."""
        return group_norm(input, self.weight, self.bias, eps=self.eps)


class _Update:
    """What the batches seen now do to running statistics: their weight, and the steps they count.

    Compiled graphs read the tensors, whose values they do not bake in; everything else reads the
    numbers, which need no device.
    """

    def __init__(self) -> None:
        self.numbers: tuple[float, int] = (MOMENTUM, 1)
        self.tensors = tuple(torch.tensor(number, device="cpu") for number in self.numbers)

    @contextmanager
    def set_to(self, weight: float, steps: int) -> Iterator[None]:
        """Hold these values while active."""
        before = self.numbers
        self._assign(weight, steps)
        try:
            yield
        finally:
            self._assign(*before)

    def _assign(self, weight: float, steps: int) -> None:
        self.numbers = (weight, steps)
        for tensor, number in zip(self.tensors, self.numbers, strict=True):
            tensor.fill_(number)

    def current(self) -> tuple[float | Tensor, ...]:
        """The weight and the steps, in the form that fits the moment."""
        return self.tensors if torch.compiler.is_compiling() else self.numbers


MOMENTUM = 0.1
_update = _Update()


def recomputing() -> AbstractContextManager[None]:
    """While active, a forward pass repeats an earlier one: running statistics stay as they are.

    Give it to activation checkpointing as the context of the recomputation.
    """
    return _update.set_to(0.0, 0)


def micro_batch(index: int, *, count: int) -> AbstractContextManager[None]:
    """While active, forward passes see micro-batch `index` of the `count` that make up a step.

    The `count` updates of the running statistics then amount to one with the micro-batches'
    average: micro-batch i gets weight m / (count - (count - 1 - i)·m) instead of the momentum m,
    which leaves m / count to each and 1 - m to the past. `num_batches_tracked` counts steps.
    """
    return _update.set_to(MOMENTUM / (count - (count - 1 - index) * MOMENTUM), int(index == 0))


class BatchNorm(nn.Module):
    """Batch normalisation over [B, H, W, C], with the state dict of torch's BatchNorm2d.

    Statistics and buffers are float32 whatever the dtype of parameters and input. Set
    `process_group` to normalise over the batches of all its ranks (any number of values per
    rank); None keeps statistics local. Running statistics move once per step, see `recomputing`
    and `micro_batch`, and once per call within it: a layer called twice moves twice.
    Raises ModelError in training where a channel has a single value to normalise.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    process_group: "distributed.ProcessGroup | None" = None

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("running_mean", torch.empty(width))
        self.register_buffer("running_var", torch.empty(width))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit gain, zero bias, and statistics of a standard normal input."""
        nn.init.ones_(self.weight)
        nn.init.ones_(self.running_var)
        for tensor in (self.bias, self.running_mean, self.num_batches_tracked):
            nn.init.zeros_(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting the model to a half-precision dtype must not cost the statistics their bits.
        kept = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # unannotated in torch
        for name, before in kept.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, before.to(after.device, torch.float32))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map [B, H, W, C]; the output has its dtype."""
        return self._normalise(x, widen(self.weight), widen(self.bias))

    def scaled(self, x: Tensor, scale: LayerScale) -> Tensor:
        """`scale(self(x))` in one pass."""
        gain, bias = widen(scale.weight.flatten()), scale.get_parameter("bias")
        return self._normalise(x, widen(self.weight) * gain, widen(self.bias) * gain + bias)

    def _normalise(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        if self.training:
            return self.run(batch_norm, x, gain, shift)
        gain = gain * torch.rsqrt(self.running_var + self.eps)
        return (x * gain + (shift - self.running_mean * gain)).to(x.dtype)

    def run(self, operator: Callable[..., Normed], x: Tensor, *parameters: Any) -> Tensor:
        """The output of one of the operators that normalise a map, whose statistics move ours."""
        if x.numel() == x.shape[-1] and self.process_group is None:
            raise ModelError(
                f"BatchNorm over {x.shape[-1]} channels got one value per channel (batch size 1 "
                "on a 1x1 map); train with a larger batch or synchronise it over processes"
            )
        out, mean, variance = operator(x, *parameters, eps=self.eps, group=self.process_group)
        self._move(mean, variance)
        return out

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        weight, steps = _update.current()
        self.running_mean += (mean - self.running_mean) * weight
        self.running_var += (variance - self.running_var) * weight
        self.num_batches_tracked += steps


def norm_linear(x: Tensor, norm: BatchNorm, linear: Pointwise) -> Tensor:
    """`linear(norm(GELU(x)))` of x [B, H, W, C], the only map saved for the backward pass."""
    if not norm.training:
        out: Tensor = linear(norm(F.gelu(x)))
        return out
    weight = linear.weight.flatten(1)
    return norm.run(gelu_norm_linear, x, widen(norm.weight), widen(norm.bias), weight, linear.bias)


def norm_conv(x: Tensor, norm: BatchNorm, conv: MultiScaleConv) -> Tensor:
    """`y + conv(y)` of y = norm(GELU(x)), x [B, H, W, C] the only map saved for backward."""
    if not norm.training:
        y: Tensor = norm(F.gelu(x))
        mixed: Tensor = conv(y)
        return y + mixed
    weights = [part.get_parameter("weight") for part in conv.proj]
    bias = torch.cat([part.get_parameter("bias") for part in conv.proj])
    return norm.run(gelu_norm_conv, x, widen(norm.weight), widen(norm.bias), weights, bias)
