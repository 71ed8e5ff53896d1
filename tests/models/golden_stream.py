"""The hash stream, weights and inputs of the golden fixtures; see golden/README.md."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
SEED = 1


def stream(name: str, count: int) -> np.ndarray:
    """`count` float64 numbers in [-1, 1) that depend on the name and SEED only."""
    mask = np.uint64(0xFFFFFFFF)
    start = (zlib.crc32(name.encode()) + 0x85EBCA6B * SEED) % 2**32
    x = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B9) + np.uint64(start)) & mask
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & mask
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & mask
    return (x ^ (x >> np.uint64(16))).astype(np.float64) / 2**31 - 1


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
        (last == "running_var", 1 + 0.5 * z),
        (last == "running_mean", 0.1 * z),
        (last == "temperature", 4.15 + 0.5 * z),
        (last in embeddings, 0.2 * z),
        (name.startswith("relative_pos_enc."), 0.5 * z),
        (name.endswith("local_unit.weight"), 0.25 * z),
        (".layer_scale_" in name and last == "weight", 0.5 + 0.25 * z),
        (last == "bias", 0.1 * z),
        (len(shape) == 1, 1 + 0.2 * z),
    ]
    fallback = z * math.sqrt(3 / max(math.prod(shape[1:]), 1))
    return next((value for holds, value in rules if holds), fallback)


def fill(model: nn.Module) -> None:
    """Load the golden weights into `model`, strictly."""
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = torch.from_numpy(weight(name, tuple(value.shape)).astype(np.float32))
        else:
            state[name] = torch.zeros_like(value)
    model.load_state_dict(state, strict=True)


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
