"""Operators in a form that other runtimes have, too, for graphs that leave torch.

Sizes may be symbols there, batches included: what depends on them is arithmetic, never a choice.
Shapes: B batch, H×W grid, C channels, K the side of a kernel; maps are channels-last.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bin_edges(size: int, bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the bins of adaptive pooling along an axis start and end, [bins] each."""
    index = torch.arange(bins, device=device)
    return index * size // bins, ((index + 1) * size + bins - 1) // bins


def pooled_by_products(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling [B, H, W, C] -> [B, *grid, C], one matrix product an axis."""
    batch, height, width, channels = x.shape
    rows, columns = _shares(height, grid[0], x), _shares(width, grid[1], x)
    x = (rows @ x.flatten(2)).view(batch, grid[0], width, channels)
    return columns @ x


def _shares(size: int, bins: int, like: Tensor) -> Tensor:
    """How much each place counts in each bin's mean, [bins, size]."""
    start, end = (edge[:, None] for edge in bin_edges(size, bins, like.device))
    place = torch.arange(size, device=like.device)
    inside = (place >= start) & (place < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


def tap_sum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The dynamic convolution as a sum over taps: elsewhere, groups must not depend on the batch.

    A row of taps at a time: all of them would take as many maps, one by one as many nodes.
    x [B, H, W, C], weight [B, K, K, C], bias [B, C]. Returns [B, H, W, C].
    """
    batch, height, width, channels = x.shape
    side = weight.shape[1]
    padded = F.pad(x, (0, 0, *(side // 2,) * 4))
    taps, places = (torch.arange(size, device=x.device) for size in (side, width))
    columns = (taps[:, None] + places).flatten()
    out = bias[:, None, None]
    for row in range(side):
        near = padded[:, row : row + height].index_select(2, columns)
        near = near.view(batch, height, side, width, channels)
        out = out + (near * weight[:, row, None, :, None]).sum(dim=2)
    return out
