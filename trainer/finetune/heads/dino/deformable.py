"""Multi-scale deformable attention (Zhu et al., arXiv 2010.04159).

Each query looks at a few points of every map, which it places itself around a point or a box.
Shapes: B batch, Q queries, N tokens, L maps, P points, h heads, d head width, C = h·d.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import linear
from .pyramid import Pyramid


def weighted_samples(
    values: Tensor, shapes: tuple[tuple[int, int], ...], points: Tensor, weights: Tensor
) -> Tensor:
    """Return the weighted sums [B, Q, h, d] of what maps hold at points between their cells.

    `values` [B, N, h, d] are the maps of `shapes`, `points` [B, Q, h, L, P, 2] are x and y with
    0..1 across a map, `weights` are [B, Q, h, L, P]. Cells are interpolated linearly; outside of
    a map there are zeros.
    """
    batch, queries, heads = points.shape[:3]
    grids = (2 * points - 1).transpose(1, 2).flatten(0, 1)
    shares = weights.transpose(1, 2).flatten(0, 1)
    counts = [height * width for height, width in shapes]
    maps = torch.split(values.permute(0, 2, 3, 1).flatten(0, 1), counts, -1)
    out = values.new_zeros(())
    for level, (one, shape) in enumerate(zip(maps, shapes, strict=True)):
        one = one.reshape(*one.shape[:2], *shape)
        found = F.grid_sample(one, grids[:, :, level], align_corners=False)
        out = out + (found * shares[:, None, :, level]).sum(-1)
    return out.reshape(batch, heads, -1, queries).permute(0, 3, 1, 2)


class DeformableAttention(nn.Module):
    """Attention to `points` points of each of `levels` maps per head."""

    def __init__(self, width: int, *, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.value = linear(width, width)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.out = linear(width, width)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.weights.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(self._star())

    def _star(self) -> Tensor:
        """The offsets to begin with: each head looks in a direction, each point a cell farther."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        farther = torch.arange(1, self.points + 1)[:, None] * directions[:, None]
        return farther[:, None].expand(-1, self.levels, -1, -1).flatten()

    def forward(
        self, queries: Tensor, references: Tensor, tokens: Tensor, pyramid: Pyramid
    ) -> Tensor:
        """Return what queries [B, Q, C] find in tokens [B, N, C]: [B, Q, C].

        `references` are points [B, Q, 2], around which offsets count cells of each map, or boxes
        [B, Q, 4], whose half sides are `points` offsets long; 0..1 across the image.
        """
        values = self.value(tokens).masked_fill(~pyramid.inside[..., None], 0)
        heads, levels, points = self.heads, self.levels, self.points
        weights = self.weights(queries).unflatten(-1, (heads, levels * points)).float().softmax(-1)
        places = self._places(self.offsets(queries).float(), references.float(), pyramid)
        found = weighted_samples(
            values.unflatten(-1, (heads, -1)).float(),
            pyramid.shapes,
            places,
            weights.unflatten(-1, (levels, points)),
        )
        out: Tensor = self.out(found.flatten(-2))
        return out

    def _places(self, offsets: Tensor, references: Tensor, pyramid: Pyramid) -> Tensor:
        """The points [B, Q, h, L, P, 2] to look at, with 0..1 across each padded map."""
        offsets = offsets.reshape(*offsets.shape[:2], self.heads, self.levels, self.points, 2)
        coverage = pyramid.coverage[:, None, None, :, None]
        centres = references[:, :, None, None, None, :2]
        if references.shape[-1] == 4:
            sides = references[:, :, None, None, None, 2:]
            return (centres + offsets * sides / (2 * self.points)) * coverage
        cells = torch.tensor([(w, h) for h, w in pyramid.shapes], device=offsets.device)
        return centres * coverage + offsets / cells[:, None]
