"""DINO (Zhang et al., arXiv 2203.03605): boxes by a transformer whose queries denoise anchors.

Its parts, each where the paper's idea is written down:

- deformable attention over maps of several scales: `deformable.py`, on tokens of `pyramid.py`;
- mixed query selection, positions from the encoder and contents learned: `selection.py`;
- boxes refined layer by layer, looking forward twice: `decoder.py`;
- contrastive denoising, with positives and negatives in separate groups: `denoising.py`;
- one-to-one matching of predictions and objects: `matching.py`; losses of every layer and of the
  encoder's proposals: `losses.py`.

Boxes, matching and losses are float32 whatever the precision around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.finetune.trunk import Trunk

from .boxes import to_corners
from .config import DinoConfig
from .decoder import Decoder
from .denoising import denoise, visibility
from .encoder import Encoder
from .losses import mean_over_ranks, set_losses
from .matching import match
from .pyramid import Projection, Pyramid
from .selection import QuerySelection, Selection
from .truth import gather_truth

PUBLISHED = DinoConfig()
DETECTIONS = 300
"""How many boxes an image gets at most."""
MULTIPLE = 32
"""Batches are padded to sides that this divides: as far as a trunk reduces them."""


class Dino(nn.Module):
    """Finds the objects of images: torchvision's convention of detectors.

    `model(images, targets)` takes float32 images [3, H, W] in 0..1 of any sizes. In training it
    returns named losses, already weighted, whose sum is to be minimised: "class", "l1" and "giou"
    of the last decoder layer, the same of the other layers together ("auxiliary_..."), of the
    encoder's proposals ("encoder_...") and of all layers' denoising queries ("denoising_...").
    Targets hold "boxes" [n, 4], corners in pixels, and "labels" int64 [n] from 0; n may be 0.

    In evaluation it returns for each image "boxes" float32 [n, 4], corners in its pixels,
    "labels" and "scores" [n], best first: the 300 best pairs of query and class.

    `num_scales` 4 takes the trunk's maps of stages 2 to 4, 5 all four, and both one more of half
    the last one's resolution. `mean` and `std` are those of the trunk's training images. Noise is
    drawn from torch's global generator. Raises ValueError in training without targets.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        trunk: Trunk,
        *,
        num_classes: int,
        num_scales: Literal[4, 5] = 4,
        mean: Sequence[float],
        std: Sequence[float],
        config: DinoConfig = PUBLISHED,
    ) -> None:
        super().__init__()
        unused = 5 - num_scales
        # The norm of a map that nothing takes sees no gradient: DDP would wait for one.
        trunk.norms[:unused].requires_grad_(False)
        self.trunk = trunk
        self.unused = unused
        self.num_classes = num_classes
        self.denoising = config.denoising
        self.register_buffer("pixel_mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("pixel_std", torch.tensor(std)[:, None, None])
        channels, strides = trunk.channels[unused:], trunk.strides[unused:]
        self.projection = Projection(channels, strides, config.width)
        self.encoder = Encoder(config, num_scales)
        self.selection = QuerySelection(config, num_classes)
        self.class_embedding = nn.Embedding(num_classes, config.width)
        self.decoder = Decoder(config, num_scales, num_classes)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training and detections in evaluation; see the class."""
        batch, sizes = self._batch(images)
        tokens, pyramid = self.projection(self.trunk(batch)[self.unused :], sizes)
        tokens = self.encoder(tokens, pyramid)
        selection = self.selection(tokens, pyramid)
        if not self.training:
            return self._detect(selection, tokens, pyramid, sizes)
        if targets is None:
            raise ValueError("Dino needs targets in training; call eval() to detect")
        return self._losses(selection, tokens, pyramid, sizes, targets)

    def _batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images normalised and padded with zeros to one size, and their own, float32 [B, 2]."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        sides = [-(-max(side) // MULTIPLE) * MULTIPLE for side in zip(*sizes, strict=True)]
        batch = self.pixel_mean.new_zeros(len(images), 3, *sides)
        for place, image, (height, width) in zip(batch, images, sizes, strict=True):
            place[:, :height, :width] = (image - self.pixel_mean) / self.pixel_std
        return batch, torch.tensor(sizes, dtype=torch.float32, device=batch.device)

    def _detect(
        self, selection: Selection, tokens: Tensor, pyramid: Pyramid, sizes: Tensor
    ) -> list[dict[str, Tensor]]:
        visible = visibility(selection.real[:, :0], selection.real, groups=1)
        logits, boxes = self.decoder(selection.content, selection.anchors, visible, tokens, pyramid)
        logits = logits[-1].masked_fill(~selection.real[..., None], -torch.inf).flatten(1)
        corners = to_corners(boxes[-1]).clamp(0, 1) * sizes.flip(-1).repeat(1, 2)[:, None]
        scores, best = logits.sigmoid().topk(min(DETECTIONS, logits.shape[1]))
        return [
            {
                "boxes": own[index // self.num_classes][score > 0],
                "labels": (index % self.num_classes)[score > 0],
                "scores": score[score > 0],
            }
            for own, index, score in zip(corners, best, scores, strict=True)
        ]

    def _losses(
        self,
        selection: Selection,
        tokens: Tensor,
        pyramid: Pyramid,
        sizes: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        truth = gather_truth(targets, sizes)
        noisy = denoise(truth, num_classes=self.num_classes, queries=self.denoising)
        logits, boxes = self.decoder(
            torch.cat([self.class_embedding(noisy.labels), selection.content], 1),
            torch.cat([noisy.anchors, selection.anchors], 1),
            visibility(noisy.real, selection.real, groups=noisy.groups),
            tokens,
            pyramid,
        )
        count = noisy.labels.shape[1]
        objects = sum(truth.counts)
        means = mean_over_ranks(sizes.new_tensor([objects, objects * noisy.groups]))
        with torch.autocast(sizes.device.type, enabled=False):
            matched_logits = torch.cat([selection.logits[None], logits[:, :, count:]])
            matched_boxes = torch.cat([selection.box_logits.sigmoid()[None], boxes[:, :, count:]])
            goals = match(matched_logits, matched_boxes, truth)
            matched = set_losses(matched_logits, matched_boxes, goals, means[0])
            denoised = set_losses(logits[:, :, :count], boxes[:, :, :count], noisy.goals, means[1])
        return {
            **{name: stages[-1] for name, stages in matched.items()},
            **{f"auxiliary_{name}": stages[1:-1].sum() for name, stages in matched.items()},
            **{f"encoder_{name}": stages[0] for name, stages in matched.items()},
            **{f"denoising_{name}": stages.sum() for name, stages in denoised.items()},
        }
