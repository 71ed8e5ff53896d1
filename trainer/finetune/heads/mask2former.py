"""Mask2Former (Cheng et al., arXiv:2112.01527): queries that each find a mask and its class.

The decoders are transformers'; losses are ours, in `mask2former_loss`. As published, the pixel
decoder computes in float32 whatever autocast says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerTransformerModule,
)

from ..trunk import Trunk
from .mask2former_loss import Prediction, mask2former_losses
from .semantic import SemanticHead, resize


@dataclass(frozen=True, kw_only=True)
class Mask2FormerSize:
    """How large the decoders are; as published.

    `width` is a multiple of 32. The loss compares masks at `num_points` points.
    """

    num_queries: int = 100
    width: int = 256
    pixel_layers: int = 6
    pixel_feedforward: int = 1024
    query_layers: int = 9
    query_feedforward: int = 2048
    num_points: int = 12544


class Mask2Former(SemanticHead):
    """Mask2Former; its scores add up, over queries, class probability times mask probability."""

    def __init__(
        self,
        trunk: Trunk,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        size: Mask2FormerSize | None = None,
    ) -> None:
        super().__init__(trunk, num_classes=num_classes, mean=mean, std=std)
        self.size = size or Mask2FormerSize()
        self.decoders = _Decoders(
            Mask2FormerConfig(
                feature_size=self.size.width,
                mask_feature_size=self.size.width,
                hidden_dim=self.size.width,
                encoder_layers=self.size.pixel_layers,
                encoder_feedforward_dim=self.size.pixel_feedforward,
                decoder_layers=self.size.query_layers + 1,  # it counts the queries themselves, too
                dim_feedforward=self.size.query_feedforward,
                num_queries=self.size.num_queries,
                common_stride=trunk.strides[0],
                feature_strides=tuple(trunk.strides),
            ),
            trunk.channels,
            num_classes,
        )

    def losses(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the losses `class`, `mask`, `dice` and `auxiliary`."""
        predictions = self.decoders(maps)
        with torch.autocast(labels.device.type, enabled=False):
            return mask2former_losses(predictions, labels, num_points=self.size.num_points)

    def scores(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the last layer's scores, which are no logits: they lie in 0..num_queries."""
        last = self.decoders(maps)[-1]
        with torch.autocast(last.masks.device.type, enabled=False):
            masks = resize(last.masks, size).sigmoid()
            return torch.einsum("bqk,bqhw->bkhw", last.classes.softmax(-1)[..., :-1], masks)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the scores, which are weighed by probabilities already."""
        return scores


class _Decoders(nn.Module):
    """The pixel decoder and the transformer decoder."""

    def __init__(self, config: Mask2FormerConfig, channels: list[int], num_classes: int) -> None:
        super().__init__()
        self.pixels = Mask2FormerPixelDecoder(config, channels)
        self.queries = Mask2FormerTransformerModule(config.feature_size, config)
        self.classes = nn.Linear(config.hidden_dim, num_classes + 1)
        self._init_weights()

    def forward(self, maps: list[Tensor]) -> list[Prediction]:
        """Return the float32 predictions of the queries as they begin and after each layer."""
        with torch.autocast(maps[0].device.type, enabled=False):
            pixels = self.pixels([map_.float() for map_ in maps])
        decoded = self.queries(pixels.multi_scale_features, pixels.mask_features)
        layers = zip(decoded.intermediate_hidden_states, decoded.masks_queries_logits, strict=True)
        return [
            Prediction(self.classes(queries.transpose(0, 1)).float(), masks.float())
            for queries, masks in layers
        ]

    def _init_weights(self) -> None:
        """Initialise as published.

        What transformers has for it, its models' post_init, takes a layer's own initialisation back
        by the one for linear layers in general: sampling would not begin around each point.
        """
        nn.init.normal_(self.pixels.level_embed)
        for part in self.pixels.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for layer in (*self.pixels.encoder.layers, *self.queries.decoder.layers):
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
            for name, parameter in layer.named_parameters():
                if "attn." in name and name.endswith("bias"):
                    nn.init.zeros_(parameter)
        for part in self.pixels.modules():
            if isinstance(part, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
                _init_sampling(part)


def _init_sampling(attention: Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention) -> None:
    """Let each head look in a direction of its own, 1, 2, ... pixels far, and weigh all alike.

    As Zhu et al. do (arXiv:2010.04159, appendix A.4).
    """
    heads, levels, points = attention.n_heads, attention.n_levels, attention.n_points
    angles = torch.arange(heads) * (2 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)  # onto a square
    distances = torch.arange(1, points + 1)[:, None]
    offsets = (directions[:, None, None] * distances).expand(heads, levels, points, 2)
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(offsets.flatten())
    for weight in (attention.sampling_offsets.weight, attention.attention_weights.weight):
        nn.init.zeros_(weight)
