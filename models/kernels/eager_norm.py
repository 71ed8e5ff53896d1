"""Batch normalisation in training, alone and between its neighbours; any faster form is judged
by it.

Invariant: an operator saves one map, its input, and computes the others again; statistics are
float32 (float64 for float64 inputs) whatever the input dtype and autocast say.
All return the output and, without gradients, mean and unbiased variance of the batch [C] for the
running statistics. `group` makes it the batch of all its ranks: one all-reduce each way.
Shapes: B batch, H×W grid, C and D channels; maps are channels-last.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from .choice import form
from .eager import LIBRARY, full_precision, wide_dtype, widen
from .eager_depthwise import scaled_residual_conv, sums_inside, tap_sums, weight_gradient

# The widest kernels that the faster form takes; its kernels are in rising order.
WIDEST_MIXED = 7

Group = distributed.ProcessGroup | None
Normed = tuple[Tensor, Tensor, Tensor]


def batch_norm(x: Tensor, gain: Tensor, shift: Tensor, *, eps: float, group: Group) -> Normed:
    """`x` [B, H, W, C] normalised, times gain [C], plus shift [C]."""
    normed: Normed = _Norm.apply(x, gain, shift, eps, group)
    return normed


def group_norm(x: Tensor, gain: Tensor, shift: Tensor, *, eps: float) -> Tensor:
    """`x` [B, H, W, C] normalised sample by sample, times gain [C], plus shift [C], in its dtype.

    Torch's operator has the faster code of its own, but what the compiler makes of its gradient
    is several times slower than what it makes of ours.
    """
    if torch.compiler.is_compiling():
        with full_precision(x):
            out: Tensor = _GroupNorm.apply(x, gain, shift, eps)
        return out
    return F.group_norm(x.permute(0, 3, 1, 2), 1, gain, shift, eps).permute(0, 2, 3, 1)


def gelu_norm_linear(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    group: Group,
) -> Normed:
    """`linear(y)` [B, H, W, D] of y = gain [C] * normalised GELU(x) + shift [C], x [B, H, W, C].

    weight [D, C], bias [D] or None.
    """
    with full_precision(x):
        out: Normed = _GeluNormLinear.apply(x, gain, shift, weight, bias, eps, group)
    return out


def gelu_norm_conv(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    weights: list[Tensor],
    bias: Tensor,
    *,
    eps: float,
    group: Group,
) -> Normed:
    """`y + conv(y)` [B, H, W, C] of y = gain [C] * normalised GELU(x) + shift [C].

    The convolution is depthwise, of several kernel sizes: each of `weights` [C_i, 1, K_i, K_i] is
    for the channels after those of the one before. bias [C].
    """
    sides = [weight.shape[-1] for weight in weights]
    mixes = sides == sorted(sides) and sides[-1] <= WIDEST_MIXED
    op = form("gelu_norm_conv", _GeluNormConv, x) if mixes else _GeluNormConv
    with full_precision(x):
        out: Normed = op.apply(x, gain, shift, eps, group, bias, *weights)
    return out


class Line(NamedTuple):
    """A batch's normalisation as a line, scale * x + constant; all [C] but the scalar `size`.

    `variance` has eps in it; `size` is the number of values that a channel's statistics are of.
    """

    gain: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor
    size: Tensor

    @property
    def inverse(self) -> Tensor:
        """One over the standard deviation."""
        return torch.rsqrt(self.variance)

    @property
    def scale(self) -> Tensor:
        """By how much the map is multiplied."""
        return self.gain * self.inverse

    @property
    def constant(self) -> Tensor:
        """What is added to that."""
        return self.shift - self.mean * self.scale

    def apply(self, x: Tensor) -> Tensor:
        """The map normalised, in its own dtype."""
        planes, statistics = x.permute(0, 3, 1, 2), (self.mean, self.variance)
        normed = F.batch_norm(planes, *statistics, self.gain, self.shift, eps=0.0)
        return normed.permute(0, 2, 3, 1)

    def through_statistics(
        self, products: Tensor, grads: Tensor, group: Group
    ) -> tuple[Tensor, Tensor]:
        """What the statistics add to the gradient of the map x: slope * x + offset.

        Of the sums over the batch of gradient times (x - mean), and of the gradient.
        """
        sums = torch.stack([products, grads])
        if group is not None:
            distributed.all_reduce(sums, group=group)
        mean_product, mean_grad = (sums / self.size).unbind()
        slope = -self.scale / self.variance * mean_product
        return slope, -self.scale * mean_grad - self.mean * slope


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float, group: Group
    ) -> Normed:
        norm, unbiased = batch_line(x, gain, shift, eps, group)
        ctx.save_for_backward(x, *norm)
        ctx.group = group
        return with_statistics(ctx, norm.apply(x), norm.mean, unbiased)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        norm, x, grad = Line(*rest), widen(x), widen(grads[0])
        grad_shift = _sum(grad)
        products = _sum(x * grad) - norm.mean * grad_shift
        slope, offset = norm.through_statistics(products, grad_shift, ctx.group)
        grad_x = torch.addcmul(offset, x, slope).addcmul_(grad, norm.scale)
        return grad_x.to(grads[0].dtype), products * norm.inverse, grad_shift, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
        wide, size = widen(x), x[0].numel()
        mean = _row_sums(wide).sum(dim=(1, 3), keepdim=True) / size
        centred = wide - mean
        variance = _row_sums(centred.square()).sum(dim=(1, 3), keepdim=True) / size
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, gain, mean, inverse)
        return (centred * (gain * inverse) + shift).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, mean, inverse = ctx.saved_tensors
        x, grad, size = widen(x), widen(grads[0]), x[0].numel()
        sums, products = (_row_sums(part).sum(dim=1, keepdim=True) for part in (grad, x * grad))
        products = products - mean * sums
        mean_grad, mean_product = (
            (part * gain).sum(dim=3, keepdim=True) / size for part in (sums, products)
        )
        slope = -(inverse**3) * mean_product
        grad_x = grad * (gain * inverse) + (x * slope - inverse * mean_grad - mean * slope)
        grad_gain, grad_shift = (part.sum(dim=(0, 1, 2)) for part in (products * inverse, sums))
        return grad_x.to(grads[0].dtype), grad_gain, grad_shift, None


class _GeluNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        group: Group,
    ) -> Normed:
        active = F.gelu(x)
        norm, unbiased = batch_line(active, gain, shift, eps, group)
        ctx.save_for_backward(x, *norm, weight)
        ctx.group = group
        # The norm is a line, and goes into the linear layer.
        wide = widen(weight)
        constant = wide @ norm.constant
        if bias is not None:
            constant = constant + bias
        out = F.linear(active, (wide * norm.scale).to(x.dtype), constant.to(x.dtype))
        return with_statistics(ctx, out, norm.mean, unbiased)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *line, weight = ctx.saved_tensors
        norm, grad, wide = Line(*line), grads[0].flatten(0, -2), widen(weight)
        with full_precision(x):
            active = F.gelu(x).flatten(0, -2)
            # All other sums over the map follow from these two.
            grad_bias, product = _sum(grads[0]), grad.t() @ active
            product = product - torch.outer(grad_bias, norm.mean)
            grad_weight = product * norm.scale + torch.outer(grad_bias, norm.shift)
            products, grad_shift = (wide * product).sum(dim=0), grad_bias @ wide
            slope, offset = norm.through_statistics(products, grad_shift, ctx.group)
            rest = _onto(offset, active, slope).view_as(x)
            grad_active = _add_product(rest, grad, (wide * norm.scale).to(x.dtype))
            grad_x = _gelu_backward(grad_active, x)
        parameters = products * norm.inverse, grad_shift, grad_weight
        return grad_x, *parameters, grad_bias if ctx.needs_input_grad[4] else None, None, None


class _GeluNormConv(torch.autograd.Function):
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
        active = F.gelu(x)
        norm, unbiased = batch_line(active, gain, shift, eps, group)
        ctx.save_for_backward(x, *norm, *weights)
        ctx.group = group
        # The norm is a line: its scale goes into the kernels, its constant into every image alike.
        kernel = one_size(weights)
        constant = bias + norm.constant * (1 + sums_inside(kernel, active.shape[1:3]))
        out = scaled_residual_conv(active, kernel * _per_kernel(norm.scale), None, norm.scale)
        return with_statistics(ctx, out.add_(constant), norm.mean, unbiased)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        split = len(Line._fields)
        norm, weights, grad = Line(*rest[:split]), rest[split:], grads[0]
        with full_precision(x):
            active, kernel = F.gelu(x), one_size(weights)
            # Of the norm's two parts, the line and the constant: no more passes over a map.
            constant = tap_sums(grad, side=kernel.shape[-1])
            line = one_size(_weight_gradients(active, grad, weights))
            line = line - constant * _per_kernel(norm.mean)
            products, grad_shift = (
                (kernel * part).sum(dim=(1, 2, 3)) + _centre(part) for part in (line, constant)
            )
            slope, offset = norm.through_statistics(products, grad_shift, ctx.group)
            flipped = (kernel * _per_kernel(norm.scale)).flip(2, 3)
            grad_active = scaled_residual_conv(grad, flipped, offset, norm.scale)
            grad_x = _gelu_backward(grad_active.addcmul_(active, slope), x)
            grad_kernel = line * _per_kernel(norm.scale) + constant * _per_kernel(norm.shift)
        parameters = products * norm.inverse, grad_shift
        return grad_x, *parameters, None, None, _centre(constant), *own_sizes(grad_kernel, weights)


def batch_line(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, group: Group
) -> tuple[Line, Tensor]:
    """What a batch's normalisation does to a map, and the batch's unbiased variance."""
    mean, variance, count = _statistics(x, group)
    unbiased = variance * (count / (count - 1).clamp_min(1))
    return Line(gain, shift, mean, variance + eps, count), unbiased


def _statistics(x: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance [C] of a map, and the number of values of a channel."""
    size = x.numel() // x.shape[-1]
    mean, variance = _local_statistics(x)
    if group is None:
        return mean, variance, mean.new_full((), size)
    # Sums travel in float64, so that the variance as E[x²] - E[x]² loses nothing.
    dtype, mean, variance = mean.dtype, mean.double(), variance.double()
    sums = torch.cat([mean, variance + mean**2, mean.new_ones(1)]) * size
    distributed.all_reduce(sums, group=group)
    count = sums[-1]
    mean, square = (sums[:-1] / count).chunk(2)
    variance = (square - mean**2).clamp_min(0)
    return mean.to(dtype), variance.to(dtype), count.to(dtype)


# An operator to the compiler, which has no code for torch's own, and would write another map to sum
# over it.
@torch.library.custom_op(f"{LIBRARY}::local_statistics", mutates_args=())
def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of this process's map, at least in float32."""
    # The statistics get the dtype of the running ones, which nothing reads here.
    running = [x.new_zeros(x.shape[-1], dtype=wide_dtype(x)) for _ in range(2)]
    planes = x.permute(0, 3, 1, 2)
    mean, variance = torch.batch_norm_update_stats(planes, running[0], running[1], 0.0)
    return mean, variance


@_local_statistics.register_fake
def _statistics_shapes(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = (x.new_empty(x.shape[-1], dtype=wide_dtype(x)) for _ in range(2))
    return mean, variance


def with_statistics(ctx: Any, out: Tensor, mean: Tensor, unbiased: Tensor) -> Normed:
    """What an operator returns: its output, and what moves the running statistics."""
    ctx.mark_non_differentiable(mean, unbiased)
    return out, mean, unbiased


def _sum(x: Tensor) -> Tensor:
    """The sum of a map over all but its channels, at least in float32."""
    return _row_sums(x).sum(dim=(0, 1, 2))


def _row_sums(x: Tensor) -> Tensor:
    """Sums [B, H, 1, C] over the rows of a map, at least in float32: the first half of any sum.

    Compiled sums over all of a map at once would stride through it.
    """
    return x.sum(dim=2, keepdim=True, dtype=wide_dtype(x))


def _onto(offset: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """`offset + slope * x`, which overwrites `x` where it has their dtype."""
    if x.dtype != offset.dtype:
        return torch.addcmul(offset, x, slope)
    line: Tensor = torch.ops.aten.addcmul.out(offset, x, slope, out=x)
    return line


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in the shape of the total, and in place where it has their dtype.

    The compiler knows no such product in place; its sum joins the pass that comes after.
    """
    if a.dtype != total.dtype or torch.compiler.is_compiling():
        return total.add_((a @ b).view_as(total))
    total.view(len(a), -1).addmm_(a, b)
    return total


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of GELU's input; overwrites `grad` where it has the input's dtype."""
    grad = grad.to(x.dtype)
    grad_x: Tensor = torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return grad_x


def one_size(weights: Sequence[Tensor]) -> Tensor:
    """Kernels of several sizes, as one [C, 1, K, K] with zeros around the smaller ones."""
    widest = max(weight.shape[-1] for weight in weights)
    margins = [(widest - weight.shape[-1]) // 2 for weight in weights]
    padded = [F.pad(w, (m,) * 4) for w, m in zip(weights, margins, strict=True)]
    return widen(torch.cat(padded))


def own_sizes(kernel: Tensor, like: list[Tensor]) -> list[Tensor]:
    """`one_size` undone: the middle of each part of the channels, sized as in `like`."""
    parts = torch.split(kernel, [len(weight) for weight in like])
    margins = [(kernel.shape[-1] - weight.shape[-1]) // 2 for weight in like]
    return [F.pad(part, (-margin,) * 4) for part, margin in zip(parts, margins, strict=True)]


def _centre(kernel: Tensor) -> Tensor:
    """The weight [C] of each channel's middle."""
    middle = kernel.shape[-1] // 2
    return kernel[:, 0, middle, middle]


def _per_kernel(values: Tensor) -> Tensor:
    """Values [C] in the shape of kernels [C, 1, 1, 1]."""
    return values[:, None, None, None]


def _weight_gradients(x: Tensor, grad: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Gradients [C_i, 1, K_i, K_i], each of its part of the channels."""
    widths = [len(weight) for weight in weights]
    parts = zip(*(torch.split(m, widths, dim=-1) for m in (x, grad)), weights, strict=True)
    return [weight_gradient(a, b, side=weight.shape[-1]) for a, b, weight in parts]
