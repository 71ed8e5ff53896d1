"""What every semantic segmentation head is: losses of labelled pixels, scores of all others.

Invariant: a head sees images in 0..1 and normalises them itself, and its losses are float32
whatever autocast does around it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..trunk import Trunk

IGNORED = 255  # the label of pixels that count in no loss and no metric


class SemanticHead(nn.Module, ABC):
    """A trunk and what tells the class of each pixel from its four maps.

    `mean` and `std` are the colours, in 0..1, that the trunk was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, trunk: Trunk, *, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.num_classes = num_classes
        for name, colour in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(colour)[:, None, None], persistent=False)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Return the losses of labelled images, or the scores of others.

        `images` are float32 [B, 3, H, W] in 0..1; `labels` int64 [B, H, W], from 0 to
        num_classes - 1, or 255 where a pixel is ignored. Losses are named float32 scalars, weighted
        already: the training loss is their sum. Scores are float32 [B, num_classes, H, W], and mean
        what `probabilities` makes of them.
        """
        maps = self.trunk((images - self.mean) / self.std)
        if labels is not None:
            return self.losses(maps, labels)
        return self.scores(maps, (images.shape[2], images.shape[3]))

    @abstractmethod
    def losses(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted losses by name, given the trunk's maps and labels [B, H, W]."""

    @abstractmethod
    def scores(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return float32 scores [B, num_classes, *size], given the trunk's maps."""

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return [B, num_classes, H, W] in 0..1, to be averaged over views of an image."""
        return scores.softmax(dim=1)


def resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return scores [B, K, h, w] as float32 [B, K, *size], interpolated between pixels' centres."""
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)


def pixel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits [B, K, h, w] at the resolution of labels [B, H, W].

    It is the mean over all pixels, those ignored adding zero to it: so it weighs every pixel alike
    on however many processes, and is a zero with gradients where all are ignored.
    """
    logits = resize(scores, (labels.shape[1], labels.shape[2]))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()


def classifier(channels: int, num_classes: int, *, dropout: float) -> nn.Sequential:
    """Return what makes logits of a map, which loses whole channels in training."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.get_parameter("bias"), 0.0)
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def init_convs(module: nn.Module) -> None:
    """Initialise convolutions as He et al. do for ReLU (arXiv:1502.01852), keeping the variance of
    gradients; norms keep the unit gain they are made with.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
