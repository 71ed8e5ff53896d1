"""The model page's table of variants, from the registry and the cost formulas."""

from __future__ import annotations

from typing import NamedTuple

import torch

from models import build
from models.cost import macs
from models.registry import MODELS

# Top-1 accuracy on ImageNet-1k in percent, by image side, as published by the authors of
# TransNeXt (arXiv 2311.17132) and TransXNet (arXiv 2310.19380) with their code.
TOP1: dict[str, dict[int, float]] = {
    "transnext_micro": {224: 82.5},
    "transnext_micro_AAAA": {256: 82.6},
    "transnext_tiny": {224: 84.0},
    "transnext_small": {224: 84.7, 384: 86.0},
    "transnext_base": {224: 84.8, 384: 86.2},
    "transxnet_t": {224: 81.6},
    "transxnet_s": {224: 83.8},
    "transxnet_b": {224: 84.6, 384: 85.5},
}
HEADER = (
    *("name", "widths", "depths", "heads", "parameters"),
    *("MACs at 224", "MACs at 384", "top-1 at 224", "top-1 at 384"),
)


class Count(NamedTuple):
    """Parameters, and multiply-adds of one image."""

    parameters: int
    macs: int


def count(name: str, side: int) -> Count:
    """Count a variant at an image side, on the meta device."""
    with torch.device("meta"):
        model = build(name, img_size=side)
    return Count(sum(parameter.numel() for parameter in model.parameters()), macs(model))


def table() -> str:
    """Every registered variant but the picos, which exist for tests and demonstrations."""
    names = [name for name in MODELS if not name.endswith("_pico")]
    rows = [HEADER, tuple("---" for _ in HEADER), *(_row(name) for name in names)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str) -> tuple[str, ...]:
    config, top1 = MODELS[name], TOP1.get(name, {})
    # A variant published at another size only stands in the first column with that size.
    own = 224 if not top1 or 224 in top1 else min(top1)
    small, large = count(name, own), count(name, 384)
    mark = "" if own == 224 else f" ({own} px)"
    per_stage = (config.widths, config.depths, config.heads)
    return (
        f"`{name}`",
        *(", ".join(map(str, values)) for values in per_stage),
        f"{small.parameters / 1e6:.1f} M",
        f"{small.macs / 1e9:.2f} G{mark}",
        f"{large.macs / 1e9:.2f} G",
        f"{top1[own]:.1f}{mark}" if top1 else "not trained, not published",
        f"{top1[384]:.1f}" if 384 in top1 else "–",
    )
