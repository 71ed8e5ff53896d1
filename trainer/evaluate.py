"""Exact top-1 and top-5 over an evaluation split: every image counted once, on any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.augment import EvalSpec
from data.base import Batch, Shard, Source, Stopped
from data.mixing import normalize
from data.pipeline import eval_batches

from .config import RunConfig
from .engine import Engine
from .signals import Signals
from .watchdog import Watchdog


class Evaluator:
    """Evaluates a run's network on its evaluation split `source`, of which `shard` is this rank's.

    `signals` may cut it short.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        *,
        shard: Shard,
        device: torch.device,
        signals: Signals,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.source = source
        self.shard = shard
        self.device = device
        self.signals = signals
        self.watchdog = watchdog

    def accuracy(self, engine: Engine) -> dict[str, float] | None:
        """Return top1 and top5 of an engine's network in percent, or None if it was stopped."""
        data, size = self.config.data, self.config.model.img_size
        batches = eval_batches(
            self.source,
            EvalSpec(
                size=size, crop_pct=self.config.eval.crop_pct, squash=self.config.model.squash
            ),
            batch_size=-(-self.config.eval.batch_size // self.shard.world_size),
            shard=self.shard,
            num_workers=data.num_workers,
            prefetch=data.prefetch,
            device=self.device,
            while_waiting=self.signals.while_waiting,
        )
        engine.fit(size)
        with closing(batches), engine.autocast():
            return evaluate(
                engine.model,
                batches,
                normalize=partial(normalize, mean=data.mean, std=data.std),
                stop=self._stop,
            )

    def _stop(self) -> bool:
        self.watchdog.at("evaluating")
        return self.signals.agree()


def hits_label(guesses: Tensor, batch: Batch) -> Tensor:
    """Return bool [B, K]: which of an image's K guesses, int64 [B, K], is its label."""
    return guesses == batch.labels[:, None]


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    normalize: Callable[[Tensor], Tensor],
    stop: Callable[[], bool],
    hits: Callable[[Tensor, Batch], Tensor] = hits_label,
) -> dict[str, float] | None:
    """Return top1 and top5 in percent, equal on all ranks, or None if it was stopped midway.

    Each rank brings its share of the split in equally many batches; padding is masked out. `stop()`
    is asked about each, and getting one may raise Stopped. `hits` says which of an image's guesses
    is right, one at most. The model is left in training mode.
    """
    counts: Tensor | None = None
    model.eval()
    try:
        for batch in batches:
            if stop():
                return None
            with torch.no_grad():
                found = _count(model(normalize(batch.images)), batch, hits)
            counts = found if counts is None else counts + found
    except Stopped:
        return None
    finally:
        model.train()
    assert counts is not None, "an evaluation split has at least one batch"
    dist.all_reduce(counts)
    top1, top5, total = counts.tolist()
    return {"top1": 100 * top1 / total, "top5": 100 * top5 / total}


def _count(logits: Tensor, batch: Batch, hits: Callable[[Tensor, Batch], Tensor]) -> Tensor:
    """Return int64 [3]: images right at first guess, right within five, and all, padding aside."""
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = hits(guesses, batch) & batch.valid[:, None]
    return torch.stack((right[:, 0].sum(), right.sum(), batch.valid.sum()))
