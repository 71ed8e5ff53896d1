"""The decoder: queries refine their boxes layer by layer.

A layer's prediction is its shift of the boxes that the layer before predicted. What it looks at
are those boxes too, but without a gradient. So a layer's loss teaches its own shift and the one
before it: it looks forward twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import DinoConfig
from .deformable import DeformableAttention
from .layers import box_head, class_head, feed_forward, linear, sine_embedding
from .pyramid import Pyramid


class DecoderLayer(nn.Module):
    """Attention among queries, then to the tokens in their boxes, then a feed-forward part."""

    def __init__(self, config: DinoConfig, levels: int) -> None:
        super().__init__()
        width = config.width
        self.self_attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.self_attention_norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(
            width, heads=config.heads, levels=levels, points=config.points
        )
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward(width, config.hidden)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        boxes: Tensor,
        hidden: Tensor,
        tokens: Tensor,
        pyramid: Pyramid,
    ) -> Tensor:
        """Return queries [B, Q, C].

        `position` [B, Q, C] embeds their `boxes` [B, Q, 4]; `hidden` [B * heads, Q, Q] is true
        where a query (row) must not see another (column).
        """
        placed = queries + position
        found = self.self_attention(placed, placed, queries, attn_mask=hidden, need_weights=False)
        queries = self.self_attention_norm(queries + found[0])
        found = self.attention(queries + position, boxes, tokens, pyramid)
        queries = self.attention_norm(queries + found)
        out: Tensor = self.feed_forward_norm(queries + self.feed_forward(queries))
        return out


class Decoder(nn.Module):
    """The layers with a class head and a box head each."""

    def __init__(self, config: DinoConfig, levels: int, num_classes: int) -> None:
        super().__init__()
        width, depth = config.width, config.decoder_layers
        self.heads = config.heads
        self.layers = nn.ModuleList(DecoderLayer(config, levels) for _ in range(depth))
        self.position = nn.Sequential(linear(2 * width, width), nn.ReLU(), linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.class_heads = nn.ModuleList(class_head(width, num_classes) for _ in range(depth))
        self.box_heads = nn.ModuleList(box_head(width) for _ in range(depth))

    def forward(
        self, queries: Tensor, anchors: Tensor, visible: Tensor, tokens: Tensor, pyramid: Pyramid
    ) -> tuple[Tensor, Tensor]:
        """Return each layer's logits [S, B, Q, classes] and boxes [S, B, Q, 4] in 0..1, float32.

        Queries [B, Q, C] begin at `anchors` [B, Q, 4], boxes as logits. `visible` [B, Q, Q] is
        true where a query (row) may see another (column); each has to see at least one.
        """
        hidden = ~visible.repeat_interleave(self.heads, 0)
        logits, boxes = [], []
        previous = anchors
        for layer, to_class, to_shift in zip(
            self.layers, self.class_heads, self.box_heads, strict=True
        ):
            now = anchors.sigmoid()
            embedding = sine_embedding(now, queries.shape[-1] // 2, temperature=10_000)
            queries = layer(queries, self.position(embedding), now, hidden, tokens, pyramid)
            normed = self.norm(queries)
            shift = to_shift(normed).float()
            logits.append(to_class(normed).float())
            boxes.append((previous + shift).sigmoid())
            previous = anchors + shift
            anchors = previous.detach()
        return torch.stack(logits), torch.stack(boxes)
