"""Semantic FPN (Kirillov et al., arXiv:1901.02446, section 3): a feature pyramid, added up.

Each level of the pyramid is brought to the finest one's resolution by convolutions, each followed
by a doubling; their sum is classified. TransXNet's published results were trained with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from ..trunk import Trunk
from .semantic import SemanticHead, classifier, init_convs, pixel_loss, resize

DROPOUT = 0.1


class SemanticFPN(SemanticHead):
    """A pyramid `pyramid` wide and branches `channels` wide; its scores are logits."""

    def __init__(
        self,
        trunk: Trunk,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        pyramid: int = 256,
        channels: int = 128,
    ) -> None:
        super().__init__(trunk, num_classes=num_classes, mean=mean, std=std)
        self.pyramid = FeaturePyramidNetwork(trunk.channels, pyramid)
        finest = trunk.strides[0]
        self.branches = nn.ModuleList(
            _branch(pyramid, channels, doublings=(stride // finest).bit_length() - 1)
            for stride in trunk.strides
        )
        self.classifier = classifier(channels, num_classes, dropout=DROPOUT)

    def losses(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the loss `segmentation`."""
        return {"segmentation": pixel_loss(self._logits(maps), labels)}

    def scores(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the logits."""
        return resize(self._logits(maps), size)

    def _logits(self, maps: list[Tensor]) -> Tensor:
        """Return logits at the resolution of the finest map."""
        named = OrderedDict((str(level), map_) for level, map_ in enumerate(maps))
        levels = self.pyramid(named).values()
        size = (maps[0].shape[2], maps[0].shape[3])
        # Where sides do not divide by the stride, doubled maps are a little larger.
        pairs = zip(self.branches, levels, strict=True)
        total = torch.stack([resize(branch(level), size) for branch, level in pairs]).sum(0)
        logits: Tensor = self.classifier(total)
        return logits


def _branch(width: int, channels: int, *, doublings: int) -> nn.Sequential:
    """Return convolutions with a doubling after each; the finest level has one and no doubling."""
    layers: list[nn.Module] = []
    for index in range(max(doublings, 1)):
        conv = nn.Conv2d(width if index == 0 else channels, channels, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    branch = nn.Sequential(*layers)
    init_convs(branch)
    return branch
