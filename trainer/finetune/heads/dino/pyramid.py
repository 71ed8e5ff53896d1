"""From the trunk's maps to tokens of one width that know which part of their image they are.

Images of a batch differ in size and are padded to a common one. Invariant: what is padding never
reaches an image's tokens, neither through convolutions nor through norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pyramid:
    """Where the N tokens of a batch lie: the cells of L maps, row by row, one map after another.

    `shapes` are the maps' (height, width). `coverage` [B, L, 2] is the share of a map's width and
    height that the image covers. `centres` [B, N, 2] are x and y of the cells' centres, where the
    image is 0..1. `inside` [B, N] tells the cells that hold any of the image.
    """

    shapes: tuple[tuple[int, int], ...]
    coverage: Tensor
    centres: Tensor
    inside: Tensor

    def levels(self) -> Tensor:
        """Return the index of each token's map, int64 [N]."""
        counts = torch.tensor([height * width for height, width in self.shapes])
        return torch.repeat_interleave(torch.arange(len(counts)), counts).to(self.inside.device)


def lay_out(sizes: Tensor, shapes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Pyramid:
    """Return where the cells of maps lie in images of `sizes` (height, width) [B, 2] in pixels."""
    spans = sizes.flip(-1)[:, None] / torch.tensor(strides, device=sizes.device)[:, None]
    centres, inside = [], []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(
            torch.arange(height, device=sizes.device),
            torch.arange(width, device=sizes.device),
            indexing="ij",
        )
        corner = torch.stack([x, y], -1).flatten(0, 1)
        centres.append((corner + 0.5) / spans[:, level, None])
        inside.append((corner < spans[:, level, None]).all(-1))
    extents = torch.tensor([(width, height) for height, width in shapes], device=sizes.device)
    return Pyramid(tuple(shapes), spans / extents, torch.cat(centres, 1), torch.cat(inside, 1))


class ImageGroupNorm(nn.GroupNorm):
    """Group norm whose statistics are those of the image alone, not of its padding."""

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:  # type: ignore[override]
        """Return x [B, C, H, W] normalised, float32; `inside` [B, 1, H, W] is 1 on the image."""
        batch, width, *shape = x.shape
        groups = x.float().reshape(batch, self.num_groups, -1, *shape)
        weight = inside[:, None] / (inside.sum((1, 2, 3), keepdim=True)[:, None] * groups.shape[2])
        mean = (groups * weight).sum((2, 3, 4), keepdim=True)
        variance = ((groups - mean).square() * weight).sum((2, 3, 4), keepdim=True)
        normed = ((groups - mean) * (variance + self.eps).rsqrt()).reshape(batch, width, *shape)
        out: Tensor = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return out


class Projection(nn.Module):
    """Brings the trunk's maps to one width and adds a map of half the last one's resolution."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int) -> None:
        super().__init__()
        self.strides = [*strides, 2 * strides[-1]]
        same = [nn.Conv2d(incoming, width, 1, bias=False) for incoming in channels]
        half = nn.Conv2d(channels[-1], width, 3, stride=2, padding=1, bias=False)
        self.convolutions = nn.ModuleList([*same, half])
        self.norms = nn.ModuleList(ImageGroupNorm(32, width) for _ in self.strides)
        for convolution in [*same, half]:
            nn.init.xavier_uniform_(convolution.weight)

    def forward(self, maps: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, Pyramid]:
        """Return tokens float32 [B, N, width] and where they lie.

        `maps` are [B, channels[i], H_i, W_i] of padded images, whose own `sizes` (height, width)
        in pixels are float32 [B, 2].
        """
        shapes = [(one.shape[2], one.shape[3]) for one in maps]
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
        pyramid = lay_out(sizes, shapes, self.strides)
        counts = [height * width for height, width in shapes]
        inside = [
            part.reshape(-1, 1, *shape).float()
            for part, shape in zip(torch.split(pyramid.inside, counts, 1), shapes, strict=True)
        ]
        images = [one * part for one, part in zip(maps, inside, strict=False)]
        tokens = [
            norm(convolution(one), part).flatten(2).transpose(1, 2)
            for one, part, convolution, norm in zip(
                [*images, images[-1]], inside, self.convolutions, self.norms, strict=True
            )
        ]
        return torch.cat(tokens, 1), pyramid
