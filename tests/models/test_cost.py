"""Parameters and multiply-adds: the published figures, and counts of code written for counting.

The networks below are computed in the plainest way from a state dict, every product a matrix
product or a convolution, so that torch's counter sees them all.
"""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import build
from models.cost import macs
from models.registry import MODELS

PUBLISHED = {  # name: parameters, then multiply-adds in G by image side
    "transnext_micro": (12_809_304, {224: 2.649, 384: 8.393}),
    "transnext_micro_AAAA": (13_114_008, {256: 3.326}),
    "transnext_tiny": (28_258_960, {224: 5.711, 384: 17.695}),
    "transnext_small": (49_741_564, {224: 10.291, 384: 32.018}),
    "transnext_base": (89_721_496, {224: 18.300, 384: 56.185}),
    "transxnet_t": (12_834_808, {224: 1.807}),
    "transxnet_s": (26_864_068, {224: 4.607}),
    "transxnet_b": (48_009_002, {224: 8.353, 384: 25.240}),
}
PROPOSED = {  # name: parameters in M, multiply-adds at 224 in G
    "transnext_large": (200.4, 40.3),
    "transnext_huge": (518.5, 104.3),
    "transnext_giant": (2125.9, 424.2),
    "transxnet_large": (116.6, 21.5),
    "transxnet_huge": (502.7, 86.1),
}


def on_meta(name, **options):
    with torch.device("meta"):
        return build(name, **options)


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    num_parameters, by_side = PUBLISHED[name]
    for side, expected in by_side.items():
        model = on_meta(name, img_size=side, pretrain_size=224)
        assert round(macs(model) / 1e9, 3) == expected
        assert size_of(model) == num_parameters


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in PUBLISHED and not name.endswith("_pico")]
)
def test_proposed_figures(name):
    model = on_meta(name)
    assert (round(size_of(model) / 1e6, 1), round(macs(model) / 1e9, 1)) == PROPOSED[name]


class Weights:
    """A state dict, addressed by prefix."""

    def __init__(self, state, prefix=""):
        self.state, self.prefix = state, prefix

    def __getitem__(self, name):
        return self.state[self.prefix + name]

    def at(self, name):
        return Weights(self.state, f"{self.prefix}{name}.")

    def has(self, name):
        return self.prefix + name in self.state

    def linear(self, x):
        return F.linear(x, self["weight"].flatten(1), self["bias"] if self.has("bias") else None)

    def layer_norm(self, x, eps):
        return F.layer_norm(x, x.shape[-1:], self["weight"], self["bias"], eps)

    def conv(self, x, *, stride=1, depthwise=True):
        weight, groups = self["weight"], x.shape[1] if depthwise else 1
        bias = self["bias"] if self.has("bias") else None
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def batch_norm(self, x):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self[name] for name in names))


def blocks_of(model, stage):
    return [block.name for block in model.blocks() if block.residual and block.stage == stage]


def heads_first(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def position_bias(weights, grid, pool, span):
    """The perceptron on the distinct pairs of offsets, found by search."""
    rows, columns = torch.meshgrid(*(torch.arange(n).double() for n in grid), indexing="ij")
    queries = torch.stack([rows, columns])
    keys = F.adaptive_avg_pool2d(queries, pool)
    offsets = queries.flatten(1).T[:, None] - keys.flatten(1).T[None]
    offsets = offsets / (torch.tensor(span) - 1) * 8
    features = offsets.sign() * torch.log2(1 + offsets.abs()) / 3
    distinct, place = features.flatten(0, 1).round(decimals=9).unique(dim=0, return_inverse=True)
    table = weights.at("cpb_fc2").linear(weights.at("cpb_fc1").linear(distinct).relu())
    return table[place].unflatten(0, offsets.shape[:2]).permute(2, 0, 1)


def scaled_queries(weights, unit, num_visible):
    scale = F.softplus(weights["temperature"]) * num_visible.double().log()[:, None]
    return (unit + weights["query_embedding"]) * scale


def global_attention(weights, x, grid, span):
    num_heads, num_tokens = len(weights["temperature"]), math.prod(grid)
    parts = weights.at("qkv").linear(x).chunk(3, dim=-1)
    q, k, v = (heads_first(part, num_heads) for part in parts)
    num_visible = torch.full((num_tokens,), num_tokens)
    logits = scaled_queries(weights, F.normalize(q, dim=-1), num_visible)
    logits = logits @ F.normalize(k, dim=-1).transpose(-2, -1)
    mixed = (logits + position_bias(weights, grid, grid, span)).softmax(dim=-1) @ v
    return weights.at("proj").linear(mixed.transpose(1, 2).flatten(2))


def windows(x, grid):
    """The nine neighbours [B, h, N, d, 9] of tokens [B, h, N, d], zero outside the image."""
    maps = x.transpose(-2, -1).flatten(0, 1).unflatten(-1, grid)
    slots = F.unfold(maps, 3, padding=1).unflatten(1, (-1, 9))
    return slots.permute(0, 3, 1, 2).unflatten(0, x.shape[:2])


def aggregated_attention(weights, x, grid, pool, span):
    num_heads = len(weights["temperature"])
    q = F.normalize(heads_first(weights.at("q").linear(x), num_heads), dim=-1)
    pooled = F.gelu(weights.at("sr").linear(x)).transpose(1, 2).unflatten(-1, grid)
    pooled = F.adaptive_avg_pool2d(pooled, pool).flatten(2).transpose(1, 2)
    pooled = weights.at("norm").layer_norm(pooled, 1e-5)
    near_k, near_v, far_k, far_v = (
        heads_first(part, num_heads)
        for tokens in (x, pooled)
        for part in weights.at("kv").linear(tokens).chunk(2, dim=-1)
    )
    inside = windows(torch.ones(1, 1, math.prod(grid), 1), grid)[0, 0, :, 0].bool()
    scaled = scaled_queries(weights, q, inside.sum(dim=-1) + math.prod(pool))
    near = (scaled[..., None, :] @ windows(F.normalize(near_k, dim=-1), grid)).squeeze(-2)
    near = near + weights["relative_pos_bias_local"][:, None]
    far = scaled @ F.normalize(far_k, dim=-1).transpose(-2, -1)
    far = far + position_bias(weights, grid, pool, span)
    shares = torch.cat([near.masked_fill(~inside, -math.inf), far], dim=-1).softmax(dim=-1)
    near = shares[..., :9] + q @ weights["learnable_tokens"] + weights["learnable_bias"]
    mixed = (windows(near_v, grid) @ near[..., None]).squeeze(-1) + shares[..., 9:] @ far_v
    return weights.at("proj").linear(mixed.transpose(1, 2).flatten(2))


def conv_glu(weights, x, grid):
    gate, value = weights.at("fc1").linear(x).chunk(2, dim=-1)
    gate = weights.at("dwconv.dwconv").conv(gate.transpose(1, 2).unflatten(-1, grid))
    return weights.at("fc2").linear(F.gelu(gate).flatten(2).transpose(1, 2) * value)


def plain_transnext(model, images):
    weights, config, x = Weights(model.state_dict()), model.config, images
    for stage, ratio in enumerate(config.sr_ratios, start=1):
        embed = weights.at(f"patch_embed{stage}")
        stride = config.stem_stride if stage == 1 else 2
        x = embed.at("proj").conv(x, stride=stride, depthwise=False)
        grid, span = tuple(x.shape[2:]), tuple(x.shape[2:])
        pool = tuple(side // ratio for side in grid)
        x = embed.at("norm").layer_norm(x.flatten(2).transpose(1, 2), 1e-5)
        for block in map(weights.at, blocks_of(model, stage)):
            normed, attn = block.at("norm1").layer_norm(x, 1e-6), block.at("attn")
            if ratio == 1:
                x = x + global_attention(attn, normed, grid, span)
            else:
                x = x + aggregated_attention(attn, normed, grid, pool, span)
            x = x + conv_glu(block.at("mlp"), block.at("norm2").layer_norm(x, 1e-6), grid)
        x = weights.at(f"norm{stage}").layer_norm(x, 1e-6)
        x = x.transpose(1, 2).unflatten(-1, grid)
    return weights.at("head").linear(x.mean(dim=(2, 3)))


def pointwise(weights, x):
    return weights.linear(x.movedim(1, -1)).movedim(-1, 1)


def group_norm(weights, x):
    return F.group_norm(x, 1, weights["weight"], weights["bias"])


def dynamic_conv(weights, x):
    (groups, width, side, _), batch = weights["weight"].shape, len(x)

    def mixture(pooled):
        reduced = weights.at("proj.0.bn").batch_norm(pointwise(weights.at("proj.0.conv"), pooled))
        logits = pointwise(weights.at("proj.1"), F.gelu(reduced))
        return logits.unflatten(1, (groups, width)).softmax(dim=1)

    kernels = (mixture(F.adaptive_avg_pool2d(x, side)) * weights["weight"]).sum(dim=1)
    biases = mixture(x.mean(dim=(2, 3), keepdim=True)).flatten(3) * weights["bias"][..., None]
    kernels, biases = kernels.flatten(0, 1)[:, None], biases.sum(dim=1).flatten()
    maps = x.flatten(0, 1)[None]
    out = F.conv2d(maps, kernels, biases, padding=side // 2, groups=batch * width)
    return out.view_as(x)


def overlapping_attention(weights, x, position, ratio):
    num_heads, reduced = len(position), x
    if ratio > 1:
        first, second = weights.at("sr.0"), weights.at("sr.1")
        reduced = first.at("bn").batch_norm(first.at("conv").conv(x, stride=ratio))
        reduced = second.at("bn").batch_norm(second.at("conv").conv(F.gelu(reduced)))
    reduced = reduced + weights.at("local_conv").conv(reduced)
    keys, values = pointwise(weights.at("kv"), reduced).flatten(2).transpose(1, 2).chunk(2, dim=-1)
    queries = pointwise(weights.at("q"), x).flatten(2).transpose(1, 2)
    q, k, v = (heads_first(part, num_heads) for part in (queries, keys, values))
    shares = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + position).softmax(dim=-1)
    return (shares @ v).transpose(-2, -1).flatten(1, 2).view_as(x)


def mixer(weights, x, position, ratio):
    near, far = x.chunk(2, dim=1)
    near = dynamic_conv(weights.at("local_unit"), near)
    far = overlapping_attention(weights.at("global_unit"), far, position, ratio)
    x, proj = torch.cat([near, far], dim=1), weights.at("proj")
    y = proj.at("2").batch_norm(F.gelu(proj.at("0").conv(x)))
    y = proj.at("5").batch_norm(F.gelu(pointwise(proj.at("3"), y)))
    return x + proj.at("7").batch_norm(pointwise(proj.at("6"), y))


def feed_forward(weights, x):
    x = weights.at("fc1.2").batch_norm(F.gelu(pointwise(weights.at("fc1.0"), x)))
    convs = [weights.at(f"dwconv.proj.{index}") for index in range(4)]
    parts = x.split([len(conv["weight"]) for conv in convs], dim=1)
    spread = torch.cat([conv.conv(part) for conv, part in zip(convs, parts, strict=True)], dim=1)
    x = weights.at("norm").batch_norm(F.gelu(x + spread))
    return weights.at("fc2.1").batch_norm(pointwise(weights.at("fc2.0"), x))


def plain_transxnet(model, images):
    weights, config, x = Weights(model.state_dict()), model.config, images
    for stage, ratio in enumerate(config.sr_ratios, start=1):
        name = "patch_embed" if stage == 1 else f"network.{2 * stage - 3}"
        stride = config.stem_stride if stage == 1 else 2
        embed = weights.at(name).at("proj")
        x = embed.at("bn").batch_norm(embed.at("conv").conv(x, stride=stride, depthwise=False))
        position = weights[f"relative_pos_enc.{stage - 1}"][0]
        for block in map(weights.at, blocks_of(model, stage)):
            x = x + block.at("pos_embed").conv(x)
            normed = group_norm(block.at("norm1"), x)
            mixed = mixer(block.at("token_mixer"), normed, position, ratio)
            x = x + block.at("layer_scale_1").conv(mixed)
            fed = feed_forward(block.at("mlp"), group_norm(block.at("norm2"), x))
            x = x + block.at("layer_scale_2").conv(fed)
    pooled = group_norm(weights.at("classifier.0"), x).mean(dim=(2, 3))
    return weights.at("classifier.2").linear(pooled)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("transnext_pico", plain_transnext), ("transxnet_pico", plain_transxnet)],
)
def test_formula_equals_a_count_of_plain_code(name, plain):
    torch.manual_seed(0)
    size = (48, 32)
    model = build(name, img_size=size, pretrain_size=size, num_classes=5).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            logits = plain(model, images)
        torch.testing.assert_close(logits, model(images), rtol=1e-9, atol=1e-9)
    assert counter.get_total_flops() == 2 * macs(model)


def test_cost_follows_the_input_size():
    model = on_meta("transnext_tiny")
    model.reset_buffers((384, 384))
    assert macs(model) == macs(on_meta("transnext_tiny", img_size=384))


@pytest.mark.parametrize(
    ("name", "expected"),  # as torchvision lists its versions of the two
    [("timm:resnet18", 1.81), ("timm:swin_tiny_patch4_window7_224", 4.49)],
)
def test_other_families_are_counted_without_being_touched(name, expected):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert round(macs(model) / 1e9, 2) == expected
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
