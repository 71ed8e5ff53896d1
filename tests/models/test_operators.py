"""Attention, mixers and feed-forwards against naive float64 code written from the formulas."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from models.geometry import StagePlan, stage_geometry
from models.kernels import eager
from models.transnext import AggregatedAttention, Attention, ConvGLU
from models.transxnet import DynamicConv, FeedForward, Mixer, OverlappingAttention

quick = settings(max_examples=10, deadline=None, derandomize=True)
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


def randomised(module, seed):
    """The module in float64 with random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(random.abs() + 0.5 if name.endswith("running_var") else 0.5 * random)
    return module


def random_map(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value, reference):
    assert value.shape == reference.shape
    error = (value - reference).abs().max() / max(1.0, reference.abs().max())
    assert error < 1e-10


def agree(module, x, value, reference):
    """Values, and gradients of a random projection with respect to input and parameters."""
    close(value, reference)
    probe, targets = random_map(7, *value.shape), [x, *module.parameters()]
    grads, expected = (torch.autograd.grad(out, targets, probe) for out in (value, reference))
    for grad, other in zip(grads, expected, strict=True):
        close(grad, other)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def position_bias(attn, grid, pool, span):
    """The log-spaced bias [h, N, M], the perceptron evaluated on every pair."""
    coords = torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    )
    keys = F.adaptive_avg_pool2d(coords[None], pool)[0].flatten(1).T
    delta = coords.flatten(1).T[:, None] - keys[None]
    delta = delta / torch.tensor([max(s - 1, 1) for s in span]) * 8
    feature = delta.sign() * torch.log2(1 + delta.abs()) / math.log2(8)
    return attn.cpb_fc2(torch.relu(attn.cpb_fc1(feature))).permute(2, 0, 1)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def naive_aggregated(attn, x, pool, span):
    (heads, _, width), (batch, rows, columns, channels) = attn.query_embedding.shape, x.shape
    split = lambda t: t.unflatten(-1, (heads, width))  # noqa: E731
    q = unit(split(attn.q(x)))
    k, v = (split(t) for t in attn.kv(x).chunk(2, dim=-1))
    k = unit(k)
    pooled = gelu(x @ attn.sr.weight[:, :, 0, 0].T + attn.sr.bias)
    pooled = F.adaptive_avg_pool2d(pooled.permute(0, 3, 1, 2), pool).flatten(2).transpose(1, 2)
    pooled = F.layer_norm(pooled, (channels,), attn.norm.weight, attn.norm.bias, 1e-5)
    pool_k, pool_v = (split(t) for t in attn.kv(pooled).chunk(2, dim=-1))
    pool_k = unit(pool_k)
    bias = position_bias(attn, (rows, columns), pool, span)
    out = torch.zeros(batch, rows, columns, heads, width, dtype=torch.float64)
    for b, row, column, h in (
        (b, i, j, h)
        for b in range(batch)
        for i in range(rows)
        for j in range(columns)
        for h in range(heads)
    ):
        window = [(row + s // 3 - 1, column + s % 3 - 1, s) for s in range(9)]
        window = [(i, j, s) for i, j, s in window if 0 <= i < rows and 0 <= j < columns]
        count = len(window) + pool[0] * pool[1]
        query = q[b, row, column, h]
        scale = F.softplus(attn.temperature[h, 0, 0]) * math.log(count)
        scaled = (query + attn.query_embedding[h, 0]) * scale
        near = [scaled @ k[b, i, j, h] + attn.relative_pos_bias_local[h, s] for i, j, s in window]
        far = pool_k[b, :, h] @ scaled + bias[h, row * columns + column]
        weights = torch.cat([torch.stack(near), far]).softmax(0)
        for weight, (i, j, s) in zip(weights, window, strict=False):
            token = query @ attn.learnable_tokens[h, :, s] + attn.learnable_bias[h, 0, s]
            out[b, row, column, h] += (weight + token) * v[b, i, j, h]
        out[b, row, column, h] += weights[len(window) :] @ pool_v[b, :, h]
    return attn.proj(out.flatten(-2))


@quick
@given(grid=grids, ratio=st.integers(2, 3), heads=st.integers(1, 3), span=grids)
@example(grid=(9, 8), ratio=4, heads=1, span=(9, 8))  # beyond the small grids' own form
def test_aggregated_attention(grid, ratio, heads, span):
    pool = tuple(max(1, side // ratio) for side in grid)
    attn = randomised(AggregatedAttention(4 * heads, heads), seed=heads)
    plan = StagePlan(grid, pool, grid, pool, span, windowed=True)
    geometry = stage_geometry(plan, device=torch.device("cpu"))
    x = random_map(1, 2, *grid, 4 * heads).requires_grad_()
    agree(attn, x, attn(x, geometry), naive_aggregated(attn, x, pool, span))


@quick
@given(grid=grids, heads=st.integers(1, 3), span=grids)
def test_cosine_attention(grid, heads, span):
    attn = randomised(Attention(4 * heads, heads), seed=heads)
    plan = StagePlan(grid, grid, grid, grid, span, windowed=False)
    geometry = stage_geometry(plan, device=torch.device("cpu"))
    x = random_map(1, 2, *grid, 4 * heads).requires_grad_()
    q, k, v = attn.qkv(x).flatten(1, 2).unflatten(-1, (3, heads, 4)).permute(2, 0, 3, 1, 4)
    scale = F.softplus(attn.temperature) * math.log(grid[0] * grid[1])
    logits = (unit(q) + attn.query_embedding) * scale @ unit(k).mT
    weights = (logits + position_bias(attn, grid, grid, span)).softmax(-1)
    reference = attn.proj((weights @ v).transpose(1, 2).flatten(2)).unflatten(1, grid)
    agree(attn, x, attn(x, geometry), reference)


def windows(x):
    """[B, h, H, W, 9, d]: the 3x3 neighbours of each pixel by unfolding, zeros outside."""
    batch, heads, rows, columns, width = x.shape
    flat = x.permute(0, 1, 4, 2, 3).reshape(batch, heads * width, rows, columns)
    patches = F.unfold(flat, 3, padding=1).view(batch, heads, width, 9, rows, columns)
    return patches.permute(0, 1, 4, 5, 3, 2)


@quick
@given(grid=st.sampled_from([(1, 1), (2, 5), (8, 8), (9, 8), (3, 30)]))
def test_window_operators(grid):
    """Both forms (small and large grids), values and gradients, which are windows themselves."""
    q, k = (random_map(seed, 2, 3, *grid, 5).requires_grad_() for seed in (1, 2))
    w = random_map(3, 2, 3, *grid, 9).requires_grad_()
    logits, mixed = eager.window_logits(q, k, 3), eager.window_mix(w, k)
    naive_logits = (windows(k) * q[..., None, :]).sum(-1)
    naive_mixed = (windows(k) * w[..., None]).sum(-2)
    close(logits, naive_logits)
    close(mixed, naive_mixed)
    probes = random_map(4, *logits.shape), random_map(5, *mixed.shape)
    grads = torch.autograd.grad([logits, mixed], [q, k, w], probes)
    naive = torch.autograd.grad([naive_logits, naive_mixed], [q, k, w], probes)
    for grad, reference in zip(grads, naive, strict=True):
        close(grad, reference)


@quick
@given(grid=grids, width=st.integers(1, 6), ratio=st.sampled_from([2, 4, 8]))
def test_conv_glu(grid, width, ratio):
    mlp = randomised(ConvGLU(width, ratio), seed=width)
    x = random_map(1, 2, *grid, width).requires_grad_()
    hidden = int(2 * int(width * ratio) / 3)
    gate, value = mlp.fc1(x).split(hidden, dim=-1)
    conv = mlp.dwconv.dwconv
    padded = F.pad(gate, (0, 0, 1, 1, 1, 1))
    gate = conv.bias + sum(
        padded[:, a : a + grid[0], b : b + grid[1]] * conv.weight[:, 0, a, b]
        for a in range(3)
        for b in range(3)
    )
    agree(mlp, x, mlp(x), mlp.fc2(gelu(gate) * value))


def batch_norm(norm, x):
    """One call in training mode, by hand, moving a copy of the statistics kept on `norm`."""
    values = x.flatten(0, -2)
    mean, var = values.mean(0), values.var(0, correction=0)
    count = len(values)
    norm.expected_mean = 0.9 * getattr(norm, "expected_mean", norm.running_mean) + 0.1 * mean
    norm.expected_var = 0.9 * getattr(
        norm, "expected_var", norm.running_var
    ) + 0.1 * var * count / (count - 1)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


@quick
@given(grid=grids, groups=st.integers(1, 3), kernel=st.sampled_from([3, 5, 7]))
def test_dynamic_conv(grid, groups, kernel):
    width = 8
    module = randomised(DynamicConv(width, groups=groups, kernel=kernel), seed=groups).train()
    x = random_map(1, 3, *grid, width)
    conv_bn, expand = module.proj
    bn = conv_bn.bn
    bn.expected_mean, bn.expected_var = bn.running_mean.clone(), bn.running_var.clone()

    def mixture(pooled):
        u = batch_norm(bn, pooled @ conv_bn.conv.weight[:, :, 0, 0].T)
        u = gelu(u) @ expand.weight[:, :, 0, 0].T + expand.bias
        return u.unflatten(-1, (groups, width)).softmax(-2)

    nchw = x.permute(0, 3, 1, 2)
    shares = mixture(F.adaptive_avg_pool2d(nchw, kernel).permute(0, 2, 3, 1))
    kernels = torch.einsum("bijgc,gcij->bcij", shares, module.weight)
    biases = torch.einsum("bgc,gc->bc", mixture(x.mean((1, 2))[:, None])[:, 0], module.bias)
    patches = F.unfold(nchw, kernel, padding=kernel // 2).view(3, width, kernel**2, -1)
    reference = torch.einsum("bcsn,bcs->bnc", patches, kernels.flatten(2)) + biases[:, None]
    close(module(x), reference.view(x.shape))
    close(bn.running_mean, bn.expected_mean)
    close(bn.running_var, bn.expected_var)
    assert bn.num_batches_tracked == 2


def as_conv(module, x):
    """A convolution of ours run by torch on channels-first maps."""
    padding = module.weight.shape[-1] // 2
    out = F.conv2d(
        x.permute(0, 3, 1, 2), module.weight, module.bias, module.stride, padding, 1, module.groups
    )
    return out.permute(0, 2, 3, 1)


def as_norm(norm, x):
    return (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


@quick
@given(grid=grids, ratio=st.sampled_from([1, 2, 4]), heads=st.integers(1, 3))
def test_overlapping_attention(grid, ratio, heads):
    width = 4 * heads
    module = randomised(OverlappingAttention(width, num_heads=heads, sr_ratio=ratio), seed=3).eval()
    x = random_map(1, 2, *grid, width)
    y = x
    if ratio > 1:
        y = gelu(as_norm(module.sr[0].bn, as_conv(module.sr[0].conv, x)))
        y = as_norm(module.sr[1].bn, as_conv(module.sr[1].conv, y))
    assert y.shape[1:3] == tuple(-(-side // ratio) for side in grid)
    y = y + as_conv(module.local_conv, y)
    k, v = as_conv(module.kv, y).flatten(1, 2).unflatten(-1, (2, heads, 4)).permute(2, 0, 3, 1, 4)
    q = as_conv(module.q, x).flatten(1, 2).unflatten(-1, (heads, 4)).transpose(1, 2)
    position = random_map(2, heads, grid[0] * grid[1], k.shape[2])
    weights = (q @ k.mT * 4**-0.5 + position).softmax(-1)
    reference = (weights @ v).transpose(1, 2).flatten(2).view(x.shape)
    close(module(x, position), reference)


@quick
@given(grid=grids)
def test_mixer_squeezes_both_halves(grid):
    module = randomised(Mixer(8, groups=2, kernel=3, num_heads=1, sr_ratio=1), seed=3).eval()
    x = random_map(1, 2, *grid, 8)
    position = random_map(2, 1, grid[0] * grid[1], grid[0] * grid[1])
    halves = module.local_unit(x[..., :4]), module.global_unit(x[..., 4:], position)
    y = torch.cat(halves, dim=-1)
    p = module.proj
    z = as_norm(p[2], gelu(as_conv(p[0], y)))
    z = as_norm(p[5], gelu(as_conv(p[3], z)))
    close(module(x, position), as_norm(p[7], as_conv(p[6], z)) + y)


@quick
@given(grid=grids, width=st.integers(1, 7))
def test_feed_forward(grid, width):
    module = randomised(FeedForward(width, 5), seed=width).eval()
    x = random_map(1, 2, *grid, width)
    y = as_norm(module.fc1[2], gelu(as_conv(module.fc1[0], x)))
    hidden = 5 * width
    parts = y.split([hidden - 3 * (hidden // 4), *[hidden // 4] * 3], dim=-1)
    convs = [as_conv(conv, part) for conv, part in zip(module.dwconv.proj, parts, strict=True)]
    y = as_norm(module.norm, gelu(y + torch.cat(convs, dim=-1)))
    close(module(x), as_norm(module.fc2[1], as_conv(module.fc2[0], y)))


@pytest.mark.parametrize("module", [AggregatedAttention(8, 2), Attention(8, 2)])
def test_half_precision_keeps_logits_wide(module):
    """bfloat16 inputs, weights and autocast give what float32 gives, within bfloat16's rounding."""
    module = randomised(module, seed=1).float()
    pool = (2, 2) if isinstance(module, AggregatedAttention) else (9, 9)
    plan = StagePlan((9, 9), pool, (9, 9), pool, (9, 9), windowed=pool == (2, 2))
    geometry = stage_geometry(plan, device=torch.device("cpu"))
    x = random_map(1, 2, 9, 9, 8).float()
    expected = module(x, geometry)
    bound = 0.02 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (module(x, geometry).float() - expected).abs().max() < bound
        assert module.position_bias(geometry).dtype == torch.float32
    assert isinstance(module, nn.Module)
    lowered = module.bfloat16()(x.bfloat16(), geometry)
    assert lowered.dtype == torch.bfloat16
    assert (lowered.float() - expected).abs().max() < 2 * bound
