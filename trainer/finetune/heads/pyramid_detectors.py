"""Mask R-CNN and RetinaNet: torchvision's detectors over a feature pyramid of our four maps."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from trainer.finetune.trunk import Trunk

Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a head is, by default as published.

    `width` are the pyramid's channels; of Mask R-CNN, `hidden` those of the fully connected layers,
    `proposals` what goes on to the second stage, `sampled` what that learns from, `convolutions`
    the layers of the masks' network.
    """

    width: int = 256
    hidden: int = 1024
    proposals: int = 1000
    sampled: int = 512
    convolutions: int = 4


SIZES = {
    "published": Size(),
    "small": Size(width=64, hidden=128, proposals=200, sampled=64, convolutions=2),
}


class Pyramid(nn.Module):
    """A trunk with a feature pyramid (FPN, https://arxiv.org/abs/1612.03144) over some stages."""

    def __init__(self, trunk: Trunk, width: int, *, first_stage: int, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.trunk = trunk
        self.first = first_stage - 1
        trunk.norms[: self.first].requires_grad_(False)  # of maps that nobody looks at
        self.out_channels = width
        self.fpn = FeaturePyramidNetwork(trunk.channels[self.first :], width, extra_blocks=extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the pyramid of images [B, 3, H, W], the finest map first."""
        maps = self.trunk(images)[self.first :]
        pyramid: dict[str, Tensor] = self.fpn(OrderedDict(zip("0123", maps, strict=False)))
        return pyramid


class TwoStage(nn.Module):
    """Mask R-CNN (https://arxiv.org/abs/1703.06870).

    In training it takes images float32 [3, H, W] in 0..1 as they are to be seen, and returns named
    losses. In evaluation it resizes them, shorter side to `side` and longer to at most `longest`,
    and returns boxes [n, 4], labels [n] from 0, scores [n] and masks [n, 1, H, W] in 0..1 of the
    images as they came.
    """

    has_masks = True

    def __init__(
        self, trunk: Trunk, *, num_classes: int, mean: Colour, std: Colour, side: int, longest: int,
        size: Size,
    ) -> None:  # fmt: skip
        super().__init__()
        background_too = num_classes + 1  # it is class 0 in there
        self.net = MaskRCNN(
            Pyramid(trunk, size.width, first_stage=1, extra=LastLevelMaxPool()),
            rpn_post_nms_top_n_train=size.proposals,
            rpn_post_nms_top_n_test=size.proposals,
            box_batch_size_per_image=size.sampled,
            box_head=TwoMLPHead(size.width * 7**2, size.hidden),
            box_predictor=FastRCNNPredictor(size.hidden, background_too),
            mask_head=MaskRCNNHeads(size.width, (size.width,) * size.convolutions, 1),
            mask_predictor=MaskRCNNPredictor(size.width, size.width, background_too),
            min_size=side,
            max_size=longest,
            image_mean=list(mean),
            image_std=list(std),
            _skip_resize=True,  # in training
        )

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return losses by name if there are targets, else predictions; see the class."""
        if targets is not None:
            moved = [{**target, "labels": target["labels"] + 1} for target in targets]
            return self.net(images, moved)
        found = self.net(images)
        return [{**one, "labels": one["labels"] - 1} for one in found]


class OneStage(nn.Module):
    """RetinaNet (https://arxiv.org/abs/1708.02002); called as `TwoStage` is, without masks."""

    has_masks = False

    def __init__(
        self, trunk: Trunk, *, num_classes: int, mean: Colour, std: Colour, side: int, longest: int,
        size: Size,
    ) -> None:  # fmt: skip
        super().__init__()
        sides = tuple(_octave(32 * 2**level) for level in range(5))
        extra = LastLevelP6P7(size.width, size.width)
        self.net = RetinaNet(
            Pyramid(trunk, size.width, first_stage=2, extra=extra),
            num_classes,
            min_size=side,
            max_size=longest,
            image_mean=list(mean),
            image_std=list(std),
            anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides)),
            detections_per_img=100,
            _skip_resize=True,
        )

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return losses by name if there are targets, else predictions; see the class."""
        return self.net(images, targets)


def _octave(side: int) -> tuple[int, int, int]:
    """Three anchor sizes a third of an octave apart, as published."""
    return side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))
