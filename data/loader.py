"""Loading planned batches: threads that read, decode and place samples, ahead of the trainer.

Owns the threads, the queue of batches, and what becomes of a sample that cannot be used.
Invariants: a batch is assembled by position in buffers of its own and handed out in order, so
neither the number of threads nor their timing can change what the trainer sees; closing the stream
ends every thread; a sample that cannot be used is replaced by the next good one of its shard, so
that no batch shrinks and no other sample moves.
Threads, not processes: decoding and resampling release the interpreter's lock, and there is
nothing to pickle, to leak, or to restart.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.base import BadSample, Batch, Cursor, DataError, Sample, Source
from data.device import to_device

Pixels = NDArray[np.uint8]
Render = Callable[[Sequence[Sample], NDArray[np.int64], Pixels], dict[int, DataError]]

_ATTEMPTS = 64  # neighbours that are tried in place of a sample


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A batch before it is loaded. Ids of -1 are padding; `keys` are what augmentation hangs on."""

    epoch: int
    ids: NDArray[np.int64]
    keys: NDArray[np.int64]
    positions: NDArray[np.int64]
    size: int
    render: Render
    cursor: Cursor
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A batch that threads are at work on: `shown` are the ids, which they may replace."""

    plan: Plan
    images: Tensor
    shown: NDArray[np.int64]
    parts: list[Future[dict[int, str]]]


class Loader:
    """Loads planned batches of `source` with `num_workers` threads, `prefetch` ahead, to `device`.

    With `replace` a sample that cannot be used is replaced; else its error is raised. Those of
    `quarantine` are not even tried.
    """

    def __init__(
        self,
        source: Source,
        *,
        num_workers: int,
        prefetch: int,
        device: torch.device,
        replace: bool = False,
    ) -> None:
        if num_workers < 1 or prefetch < 1:
            raise DataError(f"num_workers {num_workers} and prefetch {prefetch} must be at least 1")
        self.quarantine: set[int] = set()
        self._source = source
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._device = device
        self._replace = replace
        self._shard_ends = np.cumsum(source.shard_sizes)

    def stream(self, plans: Iterator[Plan]) -> Generator[tuple[Batch, Cursor]]:
        """Yield the batches of `plans` in order, each with its cursor; closing ends the threads."""
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="foveate-data")
        try:
            pending = deque(self._submit(pool, plan) for plan in islice(plans, self._prefetch))
            while pending:
                batch = pending.popleft()
                for part in batch.parts:
                    self._report(part.result())
                pending.extend(self._submit(pool, plan) for plan in islice(plans, 1))
                yield self._batch(batch), batch.plan.cursor
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, plan: Plan) -> _Pending:
        self._source.prefetch(plan.ids[plan.ids >= 0].tolist())
        shape = (len(plan.ids), plan.size, plan.size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        shown = plan.ids.copy()
        ends = np.linspace(0, len(plan.ids), self._num_workers + 1).astype(int)
        rows = [slice(*ends) for ends in pairwise(ends.tolist())]
        parts = [pool.submit(self._fill, plan, images.numpy(), shown, part) for part in rows]
        return _Pending(plan=plan, images=images, shown=shown, parts=parts)

    def _fill(
        self, plan: Plan, images: Pixels, shown: NDArray[np.int64], rows: slice
    ) -> dict[int, str]:
        """Load the samples of `rows` into their rows of `images`; blacken the padding.

        Returns id -> what was done about it of those that had to be replaced.
        """
        ids, keys, out = plan.ids[rows], plan.keys[rows], images[rows]
        held = int((ids >= 0).sum())  # padding comes last
        out[held:] = 0
        samples, failures = self._read(ids[:held].tolist())
        good = [row for row in range(held) if row not in failures]
        # The common case renders in place; what is left of a torn batch goes by way of a copy.
        target = out[:held] if len(good) == held else np.empty_like(out[: len(good)])
        for row, error in plan.render(samples, keys[good], target).items():
            failures[good[row]] = self._named(samples[row].id, error)
        if target.base is not out.base:
            out[good] = target
        said = {}
        for row, error in failures.items():
            id = int(ids[row])
            other = shown[rows][row] = self._substitute(plan, id, error, keys[row], out[row])
            said[id] = f"{error}; {self._source.name(other)} takes its place"
        return said

    def _read(self, ids: list[int]) -> tuple[list[Sample], dict[int, DataError]]:
        """Return the samples that can be read, and row -> error of those that cannot be used."""
        samples, failures = [], dict[int, DataError]()
        for row, id in enumerate(ids):
            try:
                if id in self.quarantine:
                    raise BadSample(f"{self._source.name(id)} is in quarantine")
                samples.append(self._source.read(id))
            except BadSample as error:
                failures[row] = error
        return samples, failures

    def _substitute(
        self, plan: Plan, id: int, error: DataError, key: NDArray[np.int64], out: Pixels
    ) -> int:
        """Fill one row with the next good sample of the same shard, and return its id."""
        if not self._replace:
            raise error
        for other in self._neighbours(id):
            samples, failures = self._read([other])
            if not failures and not plan.render(samples, key[None], out[None]):
                return other
        raise DataError(f"{error}; none of the {_ATTEMPTS} samples after it can be used instead")

    def _neighbours(self, id: int) -> Iterator[int]:
        """Yield the samples that follow one in its shard, from the end on to the beginning."""
        shard = int(np.searchsorted(self._shard_ends, id, side="right"))
        size = int(self._source.shard_sizes[shard])
        first = int(self._shard_ends[shard]) - size
        for step in range(1, min(size, _ATTEMPTS + 1)):
            yield first + (id - first + step) % size

    def _report(self, replaced: dict[int, str]) -> None:
        """Put samples into quarantine, and say so once."""
        for id, message in replaced.items():
            if id not in self.quarantine:
                self.quarantine.add(id)
                warnings.warn(message, stacklevel=2)

    def _named(self, id: int, error: DataError) -> DataError:
        named = BadSample(f"{self._source.name(id)} {error}")
        named.__cause__ = error
        return named

    def _batch(self, pending: _Pending) -> Batch:
        plan, valid = pending.plan, pending.plan.ids >= 0
        labels = np.where(valid, self._source.labels[pending.shown], 0)
        return Batch(
            images=pending.images.to(self._device, non_blocking=True),  # they are pinned
            labels=to_device(labels, self._device),
            ids=torch.from_numpy(pending.shown),
            planned=torch.from_numpy(plan.ids),
            positions=torch.from_numpy(plan.positions),
            valid=to_device(valid, self._device),
            epoch=plan.epoch,
            weight=plan.weight,
        )
