"""Who reads what when: an epoch cut into global batches, micro-batches and ranks.

Invariant: global batch k of an epoch is positions [k·G, (k+1)·G), on any number of processes and
however it is accumulated; so a cursor of two integers says where the stream stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.base import Cursor, DataError, Shard


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One rank's share of one micro-batch: its positions in `epoch`, and the cursor after it."""

    epoch: int
    positions: NDArray[np.int64]
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How an epoch of `num_positions` is cut into global batches, and those into micro-batches.

    The last num_positions mod global_batch positions of an epoch are left out; which samples stand
    there differs from epoch to epoch. `mix_group` neighbours always go to one rank together: 2
    where samples are mixed in pairs. Where the order has `lanes`, each rank keeps to lanes of its
    own as far as they divide among the ranks, so that no two read the same shard. Raises DataError
    if the data set is smaller than a batch.
    """

    num_positions: int
    global_batch: int
    micro_batches: int = 1
    mix_group: int = 1
    lanes: int = 0

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.micro_batches < 1:
            raise DataError(
                f"global batch {self.global_batch} and micro-batches {self.micro_batches} "
                "must be at least 1"
            )
        if self.num_positions < self.global_batch:
            raise DataError(
                f"the data set has {self.num_positions} samples, fewer than one global batch of "
                f"{self.global_batch}: lower the global batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole global batches in an epoch."""
        return self.num_positions // self.global_batch

    @property
    def used_positions(self) -> int:
        """Number of positions in those batches."""
        return self.steps_per_epoch * self.global_batch

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
        if cursor.samples % micro:
            raise DataError(
                f"the cursor stands at sample {cursor.samples} of epoch {cursor.epoch}, which is "
                f"no multiple of the micro-batch {micro} = {self.global_batch} / "
                f"{self.micro_batches}: keep the global batch until the epoch ends"
            )
        if cursor.samples + micro > self.used_positions:
            cursor = replace(cursor, epoch=cursor.epoch + 1, samples=0)
        after = cursor.samples + micro
        following = (
            replace(cursor, samples=after)
            if after < self.used_positions
            else replace(cursor, epoch=cursor.epoch + 1, samples=0)
        )
        positions = cursor.samples + self._share(micro, shard)
        return Slice(epoch=cursor.epoch, positions=positions, cursor=following)

    def lanes_of(self, first_rank: int, num_ranks: int, world_size: int) -> range:
        """Return which lanes some neighbouring ranks read."""
        if not self._keeps_lanes(world_size):
            return range(self.lanes)
        width = self.lanes // world_size
        return range(first_rank * width, (first_rank + num_ranks) * width)

    def _keeps_lanes(self, world_size: int) -> bool:
        """Whether every rank can have lanes of its own."""
        micro = self.global_batch // self.micro_batches
        return (
            self.lanes > 0
            and micro % self.lanes == 0
            and self.lanes % (world_size * self.mix_group) == 0
        )

    def _share(self, micro: int, shard: Shard) -> NDArray[np.int64]:
        """Return which of the `micro` positions of a micro-batch a rank has, int64, rising."""
        if self._keeps_lanes(shard.world_size):
            lanes = self.lanes_of(shard.rank, 1, shard.world_size)
            rows = np.arange(0, micro, self.lanes, dtype=np.int64)
            return np.add.outer(rows, np.array(lanes, np.int64)).ravel()
        share = micro // shard.world_size
        return np.arange(shard.rank * share, (shard.rank + 1) * share, dtype=np.int64)


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
