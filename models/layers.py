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
from .kernels import depthwise_conv
from .kernels.eager import widen


def drop_path(x: Tensor, keep: Tensor | None) -> Tensor:
    """Multiply a residual branch [B, ...] by its samples' `keep` [B] (0, or above 1), if any."""
    return x if keep is None else x * keep.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


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


class GroupNorm(nn.GroupNorm):
    """Normalisation of each sample over all of H, W and C, with one gain and bias a channel."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a map."""
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


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
        weight, bias = widen(self.weight), widen(self.bias)
        if not self.training:
            scale = weight * torch.rsqrt(self.running_var + self.eps)
            return (x * scale + (bias - self.running_mean * scale)).to(x.dtype)
        if self.process_group is None:
            normed, mean, variance = self._local(x, weight, bias)
        else:
            normed, mean, variance = _SynchronisedNorm.apply(
                x, weight, bias, self.eps, self.process_group
            )
        self._move(mean, variance)
        return normed

    def _local(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised map, the mean and the unbiased variance."""
        if x.numel() == x.shape[-1]:
            raise ModelError(
                f"BatchNorm over {x.shape[-1]} channels got one value per channel (batch size 1 "
                "on a 1x1 map); train with a larger batch or synchronise it over processes"
            )
        # Momentum 1 makes torch hand over the statistics of this batch.
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        normed = F.batch_norm(
            x.permute(0, 3, 1, 2), mean, variance, weight, bias, True, momentum=1.0, eps=self.eps
        )
        return normed.permute(0, 2, 3, 1), mean, variance

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        weight, steps = _update.current()
        self.running_mean += (mean - self.running_mean) * weight
        self.running_var += (variance - self.running_var) * weight
        self.num_batches_tracked += steps


class _SynchronisedNorm(torch.autograd.Function):
    """Normalisation by the statistics of all ranks of a group: one all-reduce each way.

    Sums travel in float64, so that the variance as E[x²] - E[x]² loses nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        group: "distributed.ProcessGroup",
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = widen(x).flatten(0, -2)
        variance, mean = torch.var_mean(values, dim=0, correction=0)
        mean, variance = mean.double(), variance.double()
        size = values.shape[0]
        sums = torch.cat([mean * size, (variance + mean**2) * size, mean.new_full((1,), size)])
        distributed.all_reduce(sums, group=group)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean**2).clamp_min(0)
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean.to(values.dtype), inverse.to(values.dtype), count)
        ctx.group = group
        scale = weight * inverse.to(values.dtype)
        normed = (values - mean.to(values.dtype)) * scale + bias
        unbiased = variance * (count / (count - 1).clamp_min(1))
        mean, unbiased = mean.to(values.dtype), unbiased.to(values.dtype)
        ctx.mark_non_differentiable(mean, unbiased)
        return normed.view_as(x).to(x.dtype), mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        unit = (widen(x).flatten(0, -2) - mean) * inverse
        grad = widen(grads[0]).flatten(0, -2)
        grad_weight, grad_bias = (grad * unit).sum(dim=0), grad.sum(dim=0)
        sums = torch.stack([grad_weight, grad_bias])
        distributed.all_reduce(sums, group=ctx.group)
        mean_product, mean_grad = (sums / count).to(grad.dtype)
        grad_x = (grad - mean_grad - unit * mean_product) * (weight * inverse)
        return grad_x.view_as(x).to(x.dtype), grad_weight, grad_bias, None, None
