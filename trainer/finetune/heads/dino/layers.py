"""Small parts that encoder, decoder and prediction heads are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Return a linear layer as transformers of detectors begin: Xavier weights, no bias yet."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """Return the feed-forward part of a transformer's layer."""
    return nn.Sequential(linear(width, hidden), nn.ReLU(), linear(hidden, width))


def class_head(width: int, num_classes: int, *, prior: float = 0.01) -> nn.Linear:
    """Return a classifier that begins by giving every class the probability `prior`.

    Nearly all queries stand for nothing: without the prior their loss drowns the rest at first.
    """
    head = nn.Linear(width, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


def box_head(width: int) -> nn.Sequential:
    """Return what moves a box, in logits; at first it leaves boxes where they are."""
    last = nn.Linear(width, 4)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last
    )


def sine_embedding(coordinates: Tensor, width: int, *, temperature: float) -> Tensor:
    """Return sines and cosines [..., n * width] of coordinates [..., n] in 0..1.

    Each coordinate gets width / 2 wavelengths, from 1 to nearly `temperature`, geometrically.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=coordinates.device) / half
    angles = coordinates.float()[..., None] * (2 * math.pi / temperature**steps)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
