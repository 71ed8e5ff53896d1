"""Exact top-1 and top-5 over an evaluation split: every image counted once, on any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.base import Batch


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    normalize: Callable[[Tensor], Tensor],
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Return top1 and top5 in percent, equal on all ranks, or None if `stop()` said so midway.

    Each rank brings its share of the split in equally many batches; padding is masked out. The
    model is left in training mode.
    """
    counts: Tensor | None = None
    model.eval()
    try:
        for batch in batches:
            if stop():
                return None
            with torch.no_grad():
                found = _count(model(normalize(batch.images)), batch)
            counts = found if counts is None else counts + found
    finally:
        model.train()
    assert counts is not None, "an evaluation split has at least one batch"
    dist.all_reduce(counts)
    top1, top5, total = counts.tolist()
    return {"top1": 100 * top1 / total, "top5": 100 * top5 / total}


def _count(logits: Tensor, batch: Batch) -> Tensor:
    """Return int64 [3]: images right at first guess, right within five, and all, padding aside."""
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = (guesses == batch.labels[:, None]) & batch.valid[:, None]
    return torch.stack((right[:, 0].sum(), right.sum(), batch.valid.sum()))
