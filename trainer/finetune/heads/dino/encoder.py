"""The encoder: tokens of all maps look at each other by deformable attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import DinoConfig
from .deformable import DeformableAttention
from .layers import feed_forward, sine_embedding
from .pyramid import Pyramid


class EncoderLayer(nn.Module):
    """Attention around each token's own place, then a feed-forward part; norms come after."""

    def __init__(self, config: DinoConfig, levels: int) -> None:
        super().__init__()
        width = config.width
        self.attention = DeformableAttention(
            width, heads=config.heads, levels=levels, points=config.points
        )
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward(width, config.hidden)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor, pyramid: Pyramid) -> Tensor:
        """Return tokens [B, N, C] of tokens [B, N, C] and their position embedding."""
        found = self.attention(tokens + position, pyramid.centres, tokens, pyramid)
        tokens = self.attention_norm(tokens + found)
        out: Tensor = self.feed_forward_norm(tokens + self.feed_forward(tokens))
        return out


class Encoder(nn.Module):
    """The layers, and the embedding of a token's place in its image and of its map."""

    def __init__(self, config: DinoConfig, levels: int) -> None:
        super().__init__()
        self.level_embedding = nn.Parameter(torch.randn(levels, config.width))
        self.layers = nn.ModuleList(
            EncoderLayer(config, levels) for _ in range(config.encoder_layers)
        )

    def forward(self, tokens: Tensor, pyramid: Pyramid) -> Tensor:
        """Return tokens [B, N, C] that know their surroundings, of tokens [B, N, C]."""
        place = sine_embedding(pyramid.centres, tokens.shape[-1] // 2, temperature=20)
        # Expanded, not indexed: the gradient is then a plain sum over each map.
        levels = [
            one.expand(height * width, -1)
            for one, (height, width) in zip(self.level_embedding, pyramid.shapes, strict=True)
        ]
        position = place + torch.cat(levels)
        for layer in self.layers:
            tokens = layer(tokens, position, pyramid)
        return tokens
