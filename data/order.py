"""The order of training: which sample stands at which position, and who reads it when.

Owns the permutation of an epoch and its slice for a rank. Invariant: the sample at position p of
epoch e is a pure function of (seed, e, p, n), and global batch k of an epoch is positions
[k·G, (k+1)·G): neither depends on the number of processes, on accumulation, or on history, so a
cursor of two integers is the entire state. Memory is O(1) in the size of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.base import Cursor, DataError, Shard
from data.randomness import Purpose, mix64, random_bits

_ROUNDS = 6  # even, so that each half of the bits is replaced equally often
_REPEAT_BLOCK = 64  # images whose copies stand together when samples are repeated


@dataclass(frozen=True, kw_only=True)
class Order:
    """A seeded permutation of `num_samples` ids per epoch.

    A Feistel network over the smallest power of two that holds the ids, walking cycles until
    the value falls inside (Black and Rogaway, CT-RSA 2002): at most two applications on average.
    With `repeats` above 1 an epoch shows 1/repeats of the samples, each that many times (Hoffer
    et al., arXiv:1901.09335): 64 samples, then the same ones again, moved up by one place so that
    a copy has another partner than the copy before it.
    """

    num_samples: int
    seed: int
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise DataError(f"repeats {self.repeats} must be at least 1")

    def ids(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample ids at `positions` (each in [0, num_samples)), same shape, int64."""
        if self.repeats == 1:
            return self._shuffled(epoch, positions)
        block = positions // (_REPEAT_BLOCK * self.repeats) * _REPEAT_BLOCK
        place = (positions + self.copies(positions)) % _REPEAT_BLOCK
        return self._shuffled(epoch, block + place)

    def copies(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which copy of its sample stands at each position: int64 in [0, repeats)."""
        return positions // _REPEAT_BLOCK % self.repeats

    def _shuffled(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        keys = random_bits(self.seed, epoch, np.arange(_ROUNDS), Purpose.ORDER, count=1)[:, 0]
        values = self._permute(positions.astype(np.uint64).ravel(), keys)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._permute(values[outside], keys)
            outside = outside[values[outside] >= self.num_samples]
        return values.astype(np.int64).reshape(positions.shape)

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Permute the integers below the next power of two above num_samples."""
        num_bits = (self.num_samples - 1).bit_length()
        low_bits = np.uint64(num_bits // 2)
        low_mask = np.uint64((1 << (num_bits // 2)) - 1)
        high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
        low, high = values & low_mask, values >> low_bits
        for round_index in range(0, _ROUNDS, 2):
            low = low ^ (mix64(high + keys[round_index]) & low_mask)
            high = high ^ (mix64(low + keys[round_index + 1]) & high_mask)
        return (high << low_bits) | low


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One rank's share of one micro-batch: its positions in `epoch`, and the cursor after it."""

    epoch: int
    positions: NDArray[np.int64]
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How an epoch of `num_samples` is cut into global batches, and those into micro-batches.

    The last num_samples mod global_batch positions of an epoch are left out; which samples stand
    there differs from epoch to epoch. `mix_group` neighbours always go to one rank together: 2
    where samples are mixed in pairs. Raises DataError if the data set is smaller than a batch.
    """

    num_samples: int
    global_batch: int
    micro_batches: int = 1
    mix_group: int = 1

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.micro_batches < 1:
            raise DataError(
                f"global batch {self.global_batch} and micro-batches {self.micro_batches} "
                "must be at least 1"
            )
        if self.num_samples < self.global_batch:
            raise DataError(
                f"the data set has {self.num_samples} samples, fewer than one global batch of "
                f"{self.global_batch}: lower the global batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole global batches in an epoch."""
        return self.num_samples // self.global_batch

    def check(self, shard: Shard) -> None:
        """Raise DataError unless every rank gets a whole number of samples, or of mixed groups."""
        ranks, parts, group = shard.world_size, self.micro_batches, self.mix_group
        divisor = ranks * parts * group
        if self.global_batch % divisor:
            mixed = "" if group == 1 else f" × {group} images that are mixed"
            raise DataError(
                f"global batch {self.global_batch} does not divide by {divisor} = {ranks} "
                f"processes × {parts} micro-batches{mixed}: use "
                f"{max(1, round(self.global_batch / divisor)) * divisor}"
            )

    def take(self, cursor: Cursor, shard: Shard) -> Slice:
        """Return the micro-batch that starts at `cursor`, as `shard` sees it.

        Raises DataError if the batch does not divide among the ranks, or the cursor does not
        stand on the boundary of a micro-batch.
        """
        self.check(shard)
        micro = self.global_batch // self.micro_batches
        usable = self.steps_per_epoch * self.global_batch
        if cursor.samples % micro:
            raise DataError(
                f"the cursor stands at sample {cursor.samples} of epoch {cursor.epoch}, which is "
                f"no multiple of the micro-batch {micro} = {self.global_batch} / "
                f"{self.micro_batches}: keep the global batch until the epoch ends"
            )
        if cursor.samples + micro > usable:
            cursor = replace(cursor, epoch=cursor.epoch + 1, samples=0)
        share = micro // shard.world_size
        first = cursor.samples + shard.rank * share
        after = cursor.samples + micro
        following = (
            replace(cursor, samples=after)
            if after < usable
            else replace(cursor, epoch=cursor.epoch + 1, samples=0)
        )
        positions = np.arange(first, first + share, dtype=np.int64)
        return Slice(epoch=cursor.epoch, positions=positions, cursor=following)


def evaluation_ids(
    num_samples: int, *, batch_size: int, shard: Shard
) -> Iterator[NDArray[np.int64]]:
    """Yield the ids of each evaluation batch of `shard`: int64 [batch_size], -1 where padded.

    All ranks together cover every id exactly once, and each yields the same number of batches.
    """
    stride = batch_size * shard.world_size
    for start in range(shard.rank * batch_size, _round_up(num_samples, stride), stride):
        ids = np.arange(start, start + batch_size, dtype=np.int64)
        yield np.where(ids < num_samples, ids, -1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
