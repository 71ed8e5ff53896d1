"""Where the last block of every stage attends to from one place of an image.

Invariant: the weights are those that the block multiplies its values by, learned tokens and
position biases included; what is computed here is computed again from the block's own input, so
that models need not know of it. Shapes: h heads, d head width, M keys, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import Backbone
from models.geometry import Geometry
from models.kernels import pooled_gelu
from models.kernels.eager import query_scale
from models.transnext import AggregatedAttention, Attention
from models.transxnet import OverlappingAttention

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a query at (row, column) `query` of a stage's `grid` sees of it.

    `keys` [h, P, Q] are the weights of a coarser view of the whole grid; of each of its rows, a row
    of the grid has the share `rows` [P, H], of each of its columns a column `columns` [Q, W].
    `window` [h, 9], of TransNeXt's aggregating stages, are the weights of the 3x3 cells around the
    query, row by row, 0 beyond the image. Learned tokens may make them negative.
    """

    grid: Pair
    query: Pair
    keys: Tensor
    rows: Tensor
    columns: Tensor
    window: Tensor | None = None

    def density(self) -> Tensor:
        """The mean over heads of the weights' magnitude at each cell of the grid [H, W].

        A coarser key's weight is shared evenly by the cells that it stands for.
        """
        spread = self.rows.t() @ self.keys.abs().mean(dim=0).double() @ self.columns
        if self.window is not None:
            padded = F.pad(spread, (1, 1, 1, 1))
            row, column = self.query
            padded[row : row + 3, column : column + 3] += self.window.abs().mean(dim=0).view(3, 3)
            spread = padded[1:-1, 1:-1]
        return spread

    def fovea(self) -> float | None:
        """The window's share of the weights' magnitude, if there is one."""
        if self.window is None:
            return None
        near, far = (part.abs().sum().item() for part in (self.window, self.keys))
        return near / (near + far)


def attention(model: Backbone, image: Tensor, place: tuple[float, float]) -> list[Seen]:
    """Return what the last block of each stage sees from `place` of an image [1, 3, H, W].

    The place is a (row, column) as shares of height and width. A model without attention that is
    known here gives nothing.
    """
    last = {block.stage: block.module for block in model.blocks() if block.residual}
    modules = [
        (read, part)
        for block in last.values()
        for part in block.modules()
        for kind, read in _READERS.items()
        if isinstance(part, kind)
    ]
    seen: list[Seen] = []

    def watch(read: Callable[..., Seen]) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen.append(read(module, place, *inputs))

        return note

    handles = [part.register_forward_hook(watch(read)) for read, part in modules]
    try:
        with torch.no_grad():
            model.forward_features(image)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _aggregated(
    module: AggregatedAttention, place: tuple[float, float], x: Tensor, geometry: Geometry
) -> Seen:
    """Of x [1, H, W, C]; see `models.kernels.eager.aggregated_attention`."""
    plan = geometry.plan
    row, column = query = _cell(place, plan.grid)
    token = row * plan.grid[1] + column
    rows, columns = (
        (at + torch.arange(-1, 2, device=x.device)).clamp(0, size - 1)
        for at, size in zip(query, plan.grid, strict=True)
    )
    outside = geometry.outside[token]
    unit = _unit(module.q(x[0, row, column]), module)
    scaled = _scaled(unit, module, geometry, token)
    pooled = module.norm(pooled_gelu(module.sr(x), plan.pool).flatten(1, 2))[0]
    near_keys, far_keys = (
        _unit(module.kv(part).chunk(2, dim=-1)[0], module)
        for part in (x[0, rows[:, None], columns].flatten(0, 1), pooled)
    )
    near = torch.einsum("hd,shd->hs", scaled, near_keys) + module.relative_pos_bias_local
    far = torch.einsum("hd,mhd->hm", scaled, far_keys) + module.position_bias(geometry)[:, token]
    weights = torch.cat([near.masked_fill(outside, -math.inf), far], dim=-1).softmax(dim=-1)
    tokens = torch.einsum("hd,hds->hs", unit, module.learnable_tokens) + module.learnable_bias[:, 0]
    window = (weights[:, :9] + tokens).masked_fill(outside, 0.0)
    return Seen(
        grid=plan.grid,
        query=query,
        keys=weights[:, 9:].reshape(-1, *plan.pool).cpu(),
        rows=_pooled(plan.pool[0], plan.grid[0]),
        columns=_pooled(plan.pool[1], plan.grid[1]),
        window=window.cpu(),
    )


def _global(module: Attention, place: tuple[float, float], x: Tensor, geometry: Geometry) -> Seen:
    """Of x [1, H, W, C]; see `models.kernels.eager.cosine_attention`."""
    grid = geometry.plan.grid
    row, column = query = _cell(place, grid)
    token = row * grid[1] + column
    queries, keys, _ = module.qkv(x[0]).chunk(3, dim=-1)
    scaled = _scaled(_unit(queries[row, column], module), module, geometry, token)
    logits = torch.einsum("hd,mhd->hm", scaled, _unit(keys.flatten(0, 1), module))
    weights = (logits + module.position_bias(geometry)[:, token]).softmax(dim=-1)
    return Seen(
        grid=grid,
        query=query,
        keys=weights.view(-1, *grid).cpu(),
        rows=torch.eye(grid[0], dtype=torch.float64),
        columns=torch.eye(grid[1], dtype=torch.float64),
    )


def _overlapping(
    module: OverlappingAttention, place: tuple[float, float], x: Tensor, position: Tensor
) -> Seen:
    """Of x [1, H, W, c]; see `models.kernels.eager.relative_attention`."""
    grid = (x.shape[1], x.shape[2])
    row, column = query = _cell(place, grid)
    reduced = x
    if len(module.sr) > 0:
        reduced = module.sr[1](F.gelu(module.sr[0](x)))
    keys, _ = module.kv(reduced + module.local_conv(reduced)).chunk(2, dim=-1)
    key_grid = (keys.shape[1], keys.shape[2])
    q = module.q(x)[0, row, column].view(module.num_heads, -1)
    k = keys[0].reshape(-1, *q.shape)
    logits = torch.einsum("hd,mhd->hm", q, k) / math.sqrt(q.shape[-1])
    weights = (logits + position[:, row * grid[1] + column]).softmax(dim=-1)
    return Seen(
        grid=grid,
        query=query,
        keys=weights.view(-1, *key_grid).cpu(),
        rows=_strided(key_grid[0], grid[0]),
        columns=_strided(key_grid[1], grid[1]),
    )


_READERS: dict[type[nn.Module], Callable[..., Seen]] = {
    AggregatedAttention: _aggregated,
    Attention: _global,
    OverlappingAttention: _overlapping,
}


def _cell(place: tuple[float, float], grid: Pair) -> Pair:
    """The cell of a grid that holds a place."""
    row, column = (
        min(int(share * size), size - 1) for share, size in zip(place, grid, strict=True)
    )
    return row, column


def _unit(x: Tensor, module: AggregatedAttention | Attention) -> Tensor:
    """Channels [..., C] as heads of length one [..., h, d]."""
    heads = x.reshape(*x.shape[:-1], module.temperature.shape[0], -1)
    return F.normalize(heads, dim=-1)


def _scaled(
    unit: Tensor, module: AggregatedAttention | Attention, geometry: Geometry, token: int
) -> Tensor:
    """What keys are multiplied by [h, d], of a token's unit query."""
    scale = query_scale(module.temperature, geometry.key_count)[:, token]
    return (unit + module.query_embedding[:, 0]) * scale


def _pooled(bins: int, cells: int) -> Tensor:
    """Float64 [bins, cells]: which share of a bin of adaptive average pooling each cell has."""
    shares = torch.zeros(bins, cells, dtype=torch.float64)
    for bin in range(bins):
        start, end = bin * cells // bins, -(-(bin + 1) * cells // bins)
        shares[bin, start:end] = 1 / (end - start)
    return shares


def _strided(patches: int, cells: int) -> Tensor:
    """Float64 [patches, cells]: the same of patches a stride apart; the last may reach beyond."""
    stride = -(-cells // patches)
    return (torch.arange(cells) // stride == torch.arange(patches)[:, None]).double() / stride
