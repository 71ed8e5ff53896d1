"""Mixed query selection: where queries begin is the encoder's choice, what they are is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .boxes import inverse_sigmoid
from .config import DinoConfig
from .layers import box_head, class_head, linear
from .pyramid import Pyramid


@dataclass(frozen=True)
class Selection:
    """The Q tokens per image that most look like an object: where the queries begin.

    `logits` [B, Q, classes] and `box_logits` [B, Q, 4] are the encoder's own predictions, for its
    loss; `anchors` [B, Q, 4] are the same boxes for the decoder, which sends no gradient back.
    `content` [B, Q, C] is learned and the same for all images. `real` [B, Q] is false where an
    image has fewer tokens than there are queries.
    """

    logits: Tensor
    box_logits: Tensor
    content: Tensor
    real: Tensor

    @property
    def anchors(self) -> Tensor:
        """The boxes that the decoder begins with, as logits [B, Q, 4]."""
        return self.box_logits.detach()


class QuerySelection(nn.Module):
    """Judges every token as the proposal of a box around it and takes the best ones."""

    def __init__(self, config: DinoConfig, num_classes: int) -> None:
        super().__init__()
        width = config.width
        self.transform = nn.Sequential(linear(width, width), nn.LayerNorm(width))
        self.class_head = class_head(width, num_classes)
        self.box_head = box_head(width)
        self.content = nn.Embedding(config.queries, width)

    def forward(self, tokens: Tensor, pyramid: Pyramid) -> Selection:
        """Return what the encoder's tokens [B, N, C] propose."""
        proposals = _proposals(pyramid)
        # Boxes with a centre at the very border are left to other tokens, as is the padding.
        eligible = pyramid.inside & ((pyramid.centres > 0.01) & (pyramid.centres < 0.99)).all(-1)
        features = self.transform(tokens)
        logits = self.class_head(features).float()
        best = logits.detach().amax(-1).masked_fill(~eligible, -torch.inf)
        chosen = best.topk(min(self.content.num_embeddings, best.shape[1]), 1).indices
        shift = self.box_head(_take(features, chosen)).float()
        content = self.content.weight[: chosen.shape[1]]
        return Selection(
            logits=_take(logits, chosen),
            box_logits=_take(proposals, chosen) + shift,
            content=content.expand(len(tokens), -1, -1),
            real=eligible.gather(1, chosen),
        )


def _proposals(pyramid: Pyramid) -> Tensor:
    """A square around each token, the larger the coarser its map, as logits [B, N, 4]."""
    side = (0.05 * 2.0 ** pyramid.levels())[None, :, None]
    boxes = torch.cat([pyramid.centres, side.expand(len(pyramid.centres), -1, 2)], -1)
    return inverse_sigmoid(boxes)


def _take(tokens: Tensor, chosen: Tensor) -> Tensor:
    """The tokens [B, Q, n] at `chosen` [B, Q] of tokens [B, N, n]."""
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
