"""What a forward pass costs, by arithmetic on the configuration and the grids.

Invariant: the count of our own networks follows their published definition, not the way they are
computed here; a faster form of an operator leaves it unchanged. Nothing is computed for it.
Shapes: N queries (tokens of a stage grid), M keys, C width, h heads, D or E hidden width.
"""

from copy import deepcopy
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from .base import Backbone, stage_grids
from .geometry import Geometry
from .transnext import TransNeXt
from .transxnet import TransXNet


def macs(model: Backbone) -> int:
    """Multiply-adds of the forward pass of one image at `model.size`; FLOPs are twice as many.

    Counted, at every output position and with the taps that fall on padding: linear layers,
    convolutions (TransXNet's layer scale among them, a depthwise 1x1 convolution), and the
    products of attention, which are queries by keys, weights by values and, in TransNeXt, unit
    queries by learned tokens. TransNeXt's position perceptrons count once a block, though a
    batch shares their result: the figure is that of a batch of one image. Not counted: biases,
    norms, activations, softmaxes, pooling, resizing, gating, TransNeXt's layer scale, the mixing
    of dynamic kernels and residual sums. The backward pass takes about twice as much again.

    The model may be on the meta device, and must not be sharded. Other families are counted by
    torch's own counter, which sees matrix products, convolutions and fused attention.
    """
    if isinstance(model, TransNeXt):
        return _transnext(model)
    if isinstance(model, TransXNet):
        return _transxnet(model)
    return _counted(model)


def _counted(model: Backbone) -> int:
    """What torch's counter sees in a copy without weights, on the meta device."""
    tensors = (*model.parameters(), *model.buffers())
    weightless = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    copied = deepcopy(model, weightless).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copied(torch.empty(1, 3, *model.size, device="meta"))
    flops: int = counter.get_total_flops()
    return flops // 2


def _transnext(model: TransNeXt) -> int:
    config = model.config
    total, channels = 0, 3
    for stage, width in enumerate(config.widths):
        geometry = model.geometry(stage + 1)
        num_queries = prod(geometry.plan.grid)
        kernel = 2 * config.stem_stride - 1 if stage == 0 else 3
        total += num_queries * kernel**2 * channels * width
        hidden = 2 * width * config.mlp_ratios[stage] // 3
        gated = num_queries * (3 * width * hidden + 9 * hidden)
        position = _position_perceptron(geometry, config.heads[stage])
        total += config.depths[stage] * (_cosine_attention(geometry, width) + position + gated)
        channels = width
    return total + channels * model.num_classes


def _cosine_attention(geometry: Geometry, width: int) -> int:
    """One attention of TransNeXt: 5NC² + 2MC² + NC(3·9 + 2M) if windowed, else 4NC² + 2NMC."""
    num_queries, num_keys = prod(geometry.plan.grid), prod(geometry.plan.pool)
    products = 2 * num_queries * num_keys * width
    if not geometry.plan.windowed:
        return 4 * num_queries * width**2 + products
    # Each of the nine window slots meets a key, a value and a learnable token.
    linears = 5 * num_queries * width**2 + 2 * num_keys * width**2
    return linears + products + 3 * 9 * num_queries * width


def _position_perceptron(geometry: Geometry, num_heads: int) -> int:
    """Two coordinates to 512 to `num_heads`, on every distinct pair of offsets."""
    num_pairs = len(geometry.rows) * len(geometry.columns)
    return num_pairs * 512 * (2 + num_heads)


def _transxnet(model: TransXNet) -> int:
    config = model.config
    total, channels = 0, 3
    grids = stage_grids(model.size, stem_stride=config.stem_stride)
    for stage, (width, grid) in enumerate(zip(config.widths, grids, strict=True)):
        num_queries, half = prod(grid), width // 2
        kernel = 2 * config.stem_stride - 1 if stage == 0 else 3
        total += num_queries * kernel**2 * channels * width
        squeeze = num_queries * width * (9 + 2 * max(16, width // 8))
        position_and_scales = num_queries * width * (7 * 7 + 1 + 1)
        total += config.depths[stage] * (
            position_and_scales
            + _dynamic_conv(num_queries, half, groups=config.groups[stage], kernel=config.kernel)
            + _overlapping_attention(grid, half, ratio=config.sr_ratios[stage])
            + squeeze
            + _multi_scale(num_queries, width, hidden=width * config.mlp_ratios[stage])
        )
        channels = width
    return total + channels * model.num_classes


def _dynamic_conv(num_queries: int, width: int, *, groups: int, kernel: int) -> int:
    """IDConv: its perceptron sees K² pooled cells for the kernels and one for the biases."""
    perceptron = width * (width // 4) * (1 + groups)
    return (kernel**2 + 1) * perceptron + num_queries * kernel**2 * width


def _overlapping_attention(grid: tuple[int, int], width: int, *, ratio: int) -> int:
    """OSRA: patches of side ratio + 3 and their scale, refined 3x3, then attention."""
    num_queries, num_keys = prod(grid), prod(-(-side // ratio) for side in grid)
    reduction = 0 if ratio == 1 else num_keys * width * ((ratio + 3) ** 2 + 1)
    linears = num_queries * width**2 + 2 * num_keys * width**2
    return reduction + 9 * num_keys * width + linears + 2 * num_queries * num_keys * width


def _multi_scale(num_queries: int, width: int, *, hidden: int) -> int:
    """MS-FFN: kernels of 1, 3, 5 and 7 a side, each over a quarter of the hidden channels."""
    quarter = hidden // 4
    taps = (hidden - 3 * quarter) + quarter * (3**2 + 5**2 + 7**2)
    return num_queries * (2 * width * hidden + taps)
