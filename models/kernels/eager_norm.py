"""Batch normalisation in training, alone and between its neighbours; any faster form is judged
by it.

Invariant: an operator saves one map, its input, and computes the others again; statistics are
float32 (float64 for float64 inputs) whatever the input dtype and autocast say.
All return the output and, without gradients, mean and unbiased variance of the batch [C] for the
running statistics. `group` makes it the batch of all its ranks: one all-reduce each way.
Shapes: B batch, H×W grid, C and D channels; maps are channels-last.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from .eager import full_precision, widen
from .eager_depthwise import scaled_residual_conv, weight_gradient

Group = distributed.ProcessGroup | None
Normed = tuple[Tensor, Tensor, Tensor]


def batch_norm(x: Tensor, gain: Tensor, shift: Tensor, *, eps: float, group: Group) -> Normed:
    """`x` [B, H, W, C] normalised, times gain [C], plus shift [C]."""
    normed: Normed = _Norm.apply(x, gain, shift, eps, group)
    return normed


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
    with full_precision(x):
        out: Normed = _GeluNormConv.apply(x, gain, shift, eps, group, bias, *weights)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float, group: Group
    ) -> Normed:
        normed, *statistics, unbiased = _normalise(x, gain, shift, eps, group)
        ctx.save_for_backward(x, gain, *statistics)
        ctx.group = group
        ctx.mark_non_differentiable(statistics[0], unbiased)
        return normed, statistics[0], unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, mean, inverse, count = ctx.saved_tensors
        grad = widen(grads[0])
        centred = widen(x) - mean
        products, grad_shift = _sum(centred * grad), _sum(grad)
        slope, offset = _line(products, grad_shift, gain, inverse, count, ctx.group)
        grad_x = centred.mul_(slope).addcmul_(grad, gain * inverse).add_(offset)
        return grad_x.to(x.dtype), products * inverse, grad_shift, None, None


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
        normed, *statistics, unbiased = _normalise(F.gelu(x), gain, shift, eps, group)
        ctx.save_for_backward(x, gain, shift, weight, *statistics)
        ctx.group = group
        ctx.mark_non_differentiable(statistics[0], unbiased)
        cast = None if bias is None else bias.to(x.dtype)
        return F.linear(normed, weight.to(x.dtype), cast), statistics[0], unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, weight, mean, inverse, count = ctx.saved_tensors
        grad, wide = grads[0].flatten(0, -2), widen(weight)
        with full_precision(x):
            centred = widen(F.gelu(x)).sub_(mean).flatten(0, -2)
            # All other sums over the map follow from these two.
            grad_bias, product = _sum(grads[0]), grad.t() @ centred.to(x.dtype)
            grad_weight = product * (gain * inverse) + grad_bias[:, None] * shift
            products, grad_shift = (wide * product).sum(dim=0), grad_bias @ wide
            slope, offset = _line(products, grad_shift, gain, inverse, count, ctx.group)
            rest = centred.mul_(slope).add_(offset)
            grad_active = _add_product(rest, grad, (wide * (gain * inverse)).to(x.dtype))
            grad_x = _gelu_backward(grad_active.view_as(x), x)
        parameters = products * inverse, grad_shift, grad_weight
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
        normed, *statistics, unbiased = _normalise(F.gelu(x), gain, shift, eps, group)
        ctx.save_for_backward(x, gain, shift, *statistics, *weights)
        ctx.group = group
        ctx.mark_non_differentiable(statistics[0], unbiased)
        out = scaled_residual_conv(normed, _one_size(weights), bias, torch.ones_like(gain))
        return out, statistics[0], unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, mean, inverse, count, *weights = ctx.saved_tensors
        grad = grads[0]
        with full_precision(x):
            centred = widen(F.gelu(x)).sub_(mean)
            # One image holds all that the gradients of y's constant part can see.
            image = grad.sum(dim=0, keepdim=True, dtype=centred.dtype)
            taps = _weight_gradients(centred.to(x.dtype), grad, weights)
            ones = _weight_gradients(torch.ones_like(image), image, weights)
            # The sums that the norm needs follow from these: no pass over a map.
            kernel = _one_size(weights)
            products, grad_shift = (
                (kernel * _one_size(part)).sum(dim=(1, 2, 3)) + _centre(part)
                for part in (taps, ones)
            )
            slope, offset = _line(products, grad_shift, gain, inverse, count, ctx.group)
            scale = gain * inverse
            kernel = (kernel * scale[:, None, None, None]).flip(2, 3)
            grad_active = scaled_residual_conv(grad, kernel, offset, scale)
            grad_active = grad_active.addcmul_(centred, slope)
            grad_x = _gelu_backward(grad_active, x)
            widths = [len(weight) for weight in weights]
            lines = torch.split(torch.stack([scale, shift])[..., None, None, None], widths, dim=1)
            grad_weights = [
                tap * a + one * b for tap, one, (a, b) in zip(taps, ones, lines, strict=True)
            ]
        grad_bias = _centre(ones)
        return grad_x, products * inverse, grad_shift, None, None, grad_bias, *grad_weights


def _normalise(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, group: Group
) -> tuple[Tensor, ...]:
    """The normalised map, mean, inverse deviation, number of values and unbiased variance."""
    if group is not None:
        return _normalise_together(x, gain, shift, eps, group)
    # Momentum 1 makes torch hand over the statistics of this batch.
    mean, unbiased = torch.zeros_like(gain), torch.zeros_like(gain)
    normed = F.batch_norm(
        x.permute(0, 3, 1, 2), mean, unbiased, gain, shift, True, momentum=1.0, eps=eps
    )
    size = x.numel() // x.shape[-1]
    inverse = torch.rsqrt(unbiased * ((size - 1) / size) + eps)
    return normed.permute(0, 2, 3, 1), mean, inverse, mean.new_full((), size), unbiased


def _normalise_together(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, group: distributed.ProcessGroup
) -> tuple[Tensor, ...]:
    """Sums travel in float64, so that the variance as E[x²] - E[x]² loses nothing."""
    wide = widen(x)
    size = x.numel() // x.shape[-1]
    mean = _sum(wide) / size
    square = _sum((wide - mean).square_()).double() + mean.double() ** 2 * size
    sums = torch.cat([mean.double() * size, square, square.new_full((1,), size)])
    distributed.all_reduce(sums, group=group)
    count = sums[-1]
    mean, square = (sums[:-1] / count).chunk(2)
    variance = (square - mean**2).clamp_min(0)
    inverse = torch.rsqrt(variance + eps).to(wide.dtype)
    unbiased = variance * (count / (count - 1).clamp_min(1))
    mean = mean.to(wide.dtype)
    normed = (wide - mean).mul_(inverse * gain).add_(shift)
    return normed.to(x.dtype), mean, inverse, count.to(wide.dtype), unbiased.to(wide.dtype)


def _line(
    products: Tensor, grads: Tensor, gain: Tensor, inverse: Tensor, count: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """What a norm's statistics add to its input's gradient: slope * (x - mean) + offset.

    Of the sums over the batch of gradient times (x - mean), and of the gradient.
    """
    sums = torch.stack([products, grads])
    if group is not None:
        distributed.all_reduce(sums, group=group)
    mean_product, mean_grad = (sums / count).unbind()
    scale = gain * inverse
    return -scale * inverse**2 * mean_product, -scale * mean_grad


def _sum(x: Tensor) -> Tensor:
    """The sum of a map over all but its channels, at least in float32."""
    return x.sum(dim=(0, 1, 2), dtype=torch.promote_types(x.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in their dtype, in place where it is the total's."""
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of GELU's input; overwrites `grad` where it has the input's dtype."""
    grad = grad.to(x.dtype)
    grad_x: Tensor = torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return grad_x


def _one_size(weights: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Kernels of several sizes, as one [C, 1, K, K] with zeros around the smaller ones."""
    widest = max(weight.shape[-1] for weight in weights)
    margins = [(widest - weight.shape[-1]) // 2 for weight in weights]
    padded = [F.pad(w, (m,) * 4) for w, m in zip(weights, margins, strict=True)]
    return widen(torch.cat(padded))


def _centre(weights: list[Tensor]) -> Tensor:
    """The weight [C] of each channel's middle."""
    return torch.cat([w[:, 0, w.shape[-1] // 2, w.shape[-1] // 2] for w in weights])


def _weight_gradients(x: Tensor, grad: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Gradients [C_i, 1, K_i, K_i], each of its part of the channels."""
    widths = [len(weight) for weight in weights]
    parts = zip(*(torch.split(m, widths, dim=-1) for m in (x, grad)), weights, strict=True)
    return [weight_gradient(a, b, side=weight.shape[-1]) for a, b, weight in parts]
