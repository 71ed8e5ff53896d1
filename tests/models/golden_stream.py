"""The hash stream, weights and inputs of the golden fixtures; see golden/README.md."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import build
from models.base import Backbone

GOLDEN = Path(__file__).parent / "golden"
SEED = 1


def stream(name: str, count: int) -> np.ndarray:
    """`count` float64 numbers in [-1, 1) that depend on the name and SEED only."""
    start = (zlib.crc32(name.encode()) + 0x85EBCA6B * SEED) % 2**32
    x = np.arange(1, count + 1, dtype=np.uint32)  # arithmetic wraps around at 2^32
    x *= np.uint32(0x9E3779B9)
    x += np.uint32(start)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return x / 2**31 - 1


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the state-dict entry `name`, float64."""
    z = stream(name, math.prod(shape)).reshape(shape)
    last = name.rsplit(".", 1)[-1]
    embeddings = (
        "query_embedding",
        "learnable_tokens",
        "relative_pos_bias_local",
        "learnable_bias",
    )
    rules = [
        (last == "running_var", 1, 0.5),
        (last == "running_mean", 0, 0.1),
        (last == "temperature", 4.15, 0.5),
        (last in embeddings, 0, 0.2),
        (name.startswith("relative_pos_enc."), 0, 0.5),
        (name.endswith("local_unit.weight"), 0, 0.25),
        (".layer_scale_" in name and last == "weight", 0.5, 0.25),
        (last == "bias", 0, 0.1),
        (len(shape) == 1, 1, 0.2),
        (True, 0, math.sqrt(3 / max(math.prod(shape[1:]), 1))),
    ]
    return next(offset + scale * z for holds, offset, scale in rules if holds)


def golden_model(name: str, **options: Any) -> Backbone:
    """Build a model with the golden weights, loaded strictly."""
    with torch.device("meta"):
        model = build(name, **options)
    state = {
        key: torch.from_numpy(weight(key, tuple(value.shape)).astype(np.float32))
        if value.is_floating_point()
        else torch.zeros(value.shape, dtype=value.dtype)
        for key, value in model.state_dict().items()
    }
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=True)
    model.reset_buffers(model.size)
    return model


def images(batch: int, size: tuple[int, int]) -> Tensor:
    """The golden input [batch, 3, H, W]."""
    height, width = size
    b, c, i, j = np.ogrid[:batch, :3, :height, :width]
    waves = np.sin(2 * np.pi * ((c + 1) * i / height + (b + 1) * j / width))
    noise = stream("input", batch * 3 * height * width).reshape(batch, 3, height, width)
    return torch.from_numpy((waves + 0.5 * noise).astype(np.float32))


def labels(batch: int) -> Tensor:
    return (37 * torch.arange(batch) + 3) % 1000


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        return dict(archive)


def document(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def summary(x: Tensor) -> np.ndarray:
    """[mean, standard deviation, max abs, first 64 values] of a stage output [B, C, H, W]."""
    flat = x.detach().double().flatten()
    head = torch.stack([flat.mean(), flat.std(correction=0), flat.abs().max()])
    return torch.cat([head, flat[:64]]).numpy()


def deviation(value: Any, reference: np.ndarray) -> float:
    """Largest difference, relative to the largest reference magnitude but at least to 1."""
    value = np.asarray(value, dtype=np.float64)
    assert value.shape == reference.shape
    return float(np.abs(value - reference).max() / max(1.0, np.abs(reference).max()))
