"""The sizes of a DINO detector."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """What makes one size; the defaults are as published.

    `width` is that of every token and query, `hidden` that within the feed-forward parts, `heads`
    and `points` (per head and map) are those of the attentions. `queries` are boxes predicted per
    image; `denoising` is how many positive denoising queries an image gets at most, if it has
    fewer boxes than that.
    """

    width: int = 256
    hidden: int = 2048
    heads: int = 8
    points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 900
    denoising: int = 100
