"""Hand-written gradients against autograd's own on the formulas, in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models.kernels import (
    batch_norm,
    depthwise_conv,
    dynamic_conv,
    gelu_norm_conv,
    gelu_norm_linear,
    group_norm,
)

quick = settings(max_examples=15, deadline=None, derandomize=True)
grids = st.tuples(st.integers(1, 6), st.integers(1, 9))
EPS = 1e-5


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same(out, reference, inputs):
    """Equal values, and equal gradients of a random combination of them."""
    torch.testing.assert_close(out, reference, rtol=1e-10, atol=1e-10)
    probe = randn(99, *out.shape).detach()
    grads, expected = (torch.autograd.grad(y, inputs, probe) for y in (out, reference))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


def plain_conv(x, weight, bias, stride=1):
    padding, groups = weight.shape[-1] // 2, x.shape[-1]
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, 1, groups)
    return out.permute(0, 2, 3, 1)


def plain_norm(x, gain, shift):
    values = x.flatten(0, 2)
    variance, mean = torch.var_mean(values, dim=0, correction=0)
    return (x - mean) / (variance + EPS).sqrt() * gain + shift


def check_statistics(x, mean, variance):
    torch.testing.assert_close(mean, x.flatten(0, 2).mean(0))
    torch.testing.assert_close(variance, x.flatten(0, 2).var(0))


@quick
@given(grid=grids, kernel=st.sampled_from([1, 3, 5, 7, 9, 11]), stride=st.integers(1, 4))
def test_depthwise_conv(grid, kernel, stride):
    x, weight, bias = randn(1, 2, *grid, 3), randn(2, 3, 1, kernel, kernel), randn(3, 3)
    out = depthwise_conv(x, weight, bias, stride=stride)
    assert_same(out, plain_conv(x, weight, bias, stride), [x, weight, bias])
    assert_same(
        depthwise_conv(x, weight, None, stride=stride),
        plain_conv(x, weight, None, stride),
        [x, weight],
    )


@quick
@given(grid=grids, kernel=st.sampled_from([3, 5, 7]))
def test_dynamic_conv(grid, kernel):
    x, weight, bias = randn(1, 2, *grid, 3), randn(2, 2, kernel, kernel, 3), randn(3, 2, 3)
    each = [
        plain_conv(x[i : i + 1], weight[i].permute(2, 0, 1)[:, None], bias[i]) for i in range(2)
    ]
    assert_same(dynamic_conv(x, weight, bias), torch.cat(each), [x, weight, bias])


@quick
@given(grid=grids)
def test_batch_norm(grid):
    x, gain, shift = randn(1, 2, *grid, 3), randn(2, 3), randn(3, 3)
    out, *statistics = batch_norm(x, gain, shift, eps=EPS, group=None)
    assert_same(out, plain_norm(x, gain, shift), [x, gain, shift])
    check_statistics(x, *statistics)


def test_group_norm():
    """The gradient that the compiler gets in place of torch's own."""
    x, gain, shift = randn(1, 2, 5, 9, 3), randn(2, 3), randn(3, 3)
    compiled = torch.compile(group_norm, fullgraph=True, backend="eager")
    for operator in (compiled, group_norm):
        variance, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
        reference = (x - mean) / (variance + EPS).sqrt() * gain + shift
        assert_same(operator(x, gain, shift, eps=EPS), reference, [x, gain, shift])


@quick
@given(grid=grids, with_bias=st.booleans())
def test_gelu_norm_linear(grid, with_bias):
    x, gain, shift = randn(1, 2, *grid, 3), randn(2, 3), randn(3, 3)
    weight, bias = randn(4, 5, 3), randn(5, 5) if with_bias else None
    out, *statistics = gelu_norm_linear(x, gain, shift, weight, bias, eps=EPS, group=None)
    reference = F.linear(plain_norm(F.gelu(x), gain, shift), weight, bias)
    assert_same(out, reference, [x, gain, shift, weight, *([bias] if with_bias else [])])
    check_statistics(F.gelu(x), *statistics)


@quick
@given(grid=grids, zero_gain=st.booleans())
def test_gelu_norm_conv(grid, zero_gain):
    x, gain, shift = randn(1, 2, *grid, 7), randn(2, 7), randn(3, 7)
    if zero_gain:
        gain = torch.zeros_like(gain).requires_grad_()
    widths, kernels = [4, 1, 1, 1], [1, 3, 5, 7]
    weights = [randn(4 + k, w, 1, k, k) for w, k in zip(widths, kernels, strict=True)]
    bias = randn(4, 7)
    out, *statistics = gelu_norm_conv(x, gain, shift, weights, bias, eps=EPS, group=None)
    y = plain_norm(F.gelu(x), gain, shift)
    parts = zip(y.split(widths, -1), weights, bias.split(widths), strict=True)
    reference = y + torch.cat([plain_conv(*part) for part in parts], dim=-1)
    assert_same(out, reference, [x, gain, shift, bias, *weights])
    check_statistics(F.gelu(x), *statistics)


def test_one_map_is_saved():
    """Activated and normalised maps are computed again, not kept."""
    x, gain, shift = randn(1, 2, 8, 8, 7), randn(2, 7), randn(3, 7)
    weights = [randn(4 + k, w, 1, k, k) for w, k in ((4, 3), (3, 5))]
    saved = []

    def pack(tensor):
        if tensor.numel() == x.numel():
            saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gelu_norm_linear(x, gain, shift, randn(4, 5, 7), None, eps=EPS, group=None)
        gelu_norm_conv(x, gain, shift, weights, randn(4, 7), eps=EPS, group=None)
    assert saved == [x.data_ptr()] * 2
