"""Who reads what when: an epoch cut into global batches, micro-batches and ranks.

Invariant: global batch k of an epoch is positions [k·G, (k+1)·G), on any number of processes and
however it is accumulated; so a cursor of two integers says where the stream stands. Where ranks do
not divide a batch, some have one group of images more than others, and losses are weighted by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.base import Cursor, DataError, Shard
from data.order import PARTNERS


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One rank's share of one micro-batch: its positions in `epoch`, and the cursor after it.

    The mean over ranks of `weight` times each one's mean is the mean over the micro-batch.
    """

    epoch: int
    positions: NDArray[np.int64]
    weight: float
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How an epoch of `num_positions` is cut into global batches, and those into micro-batches.

    The last num_positions mod global_batch positions of an epoch are left out; which samples stand
    there differs from epoch to epoch. `mix_group` neighbours always go to one rank together: 2
    where samples are mixed in pairs. Where the order has `lanes`, each rank keeps to lanes of its
    own as far as they and a micro-batch divide among the ranks, so that no two read the same shard.
    Raises DataError if the data set is smaller than a batch, or a micro-batch tears a group.
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
        if self.global_batch % (self.micro_batches * self.mix_group):
            raise DataError(
                f"global batch {self.global_batch} does not divide by {self.micro_batches} "
                f"micro-batches × {self.mix_group} images that are mixed"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole global batches in an epoch."""
        return self.num_positions // self.global_batch

    @property
    def used_positions(self) -> int:
        """Number of positions in those batches."""
        return self.steps_per_epoch * self.global_batch

    @property
    def _micro(self) -> int:
        """Number of samples in a micro-batch over all ranks."""
        return self.global_batch // self.micro_batches

    @property
    def _groups(self) -> int:
        """Number of groups that stay together in a micro-batch."""
        return self._micro // self.mix_group

    def check(self, shard: Shard) -> None:
        """Raise DataError unless every rank gets at least one group of every micro-batch."""
        ranks, parts, group = shard.world_size, self.micro_batches, self.mix_group
        if self._groups < ranks:
            mixed = "" if group == 1 else f" × {group} images that are mixed"
            raise DataError(
                f"global batch {self.global_batch} is too small for {ranks} processes × {parts} "
                f"micro-batches{mixed}: use at least {ranks * parts * group}, or fewer processes"
            )

    def take(self, cursor: Cursor, shard: Shard) -> Slice:
        """Return the micro-batch that starts at `cursor`, as `shard` sees it.

        Raises DataError if a rank would get nothing, or the cursor does not stand on the boundary
        of a micro-batch.
        """
        self.check(shard)
        if cursor.samples % self._micro:
            raise DataError(
                f"the cursor stands at sample {cursor.samples} of epoch {cursor.epoch}, which is "
                f"no multiple of the micro-batch {self._micro} = {self.global_batch} / "
                f"{self.micro_batches}: keep the global batch until the epoch ends"
            )
        if cursor.samples + self._micro > self.used_positions:
            cursor = replace(cursor, epoch=cursor.epoch + 1, samples=0)
        after = cursor.samples + self._micro
        following = (
            replace(cursor, samples=after)
            if after < self.used_positions
            else replace(cursor, epoch=cursor.epoch + 1, samples=0)
        )
        share = self._share(shard)
        return Slice(
            epoch=cursor.epoch,
            positions=cursor.samples + share,
            weight=len(share) * shard.world_size / self._micro,
            cursor=following,
        )

    def lanes_of(self, first_rank: int, num_ranks: int, world_size: int) -> NDArray[np.int64]:
        """Return which lanes some neighbouring ranks read, int64."""
        lanes = np.arange(self.lanes, dtype=np.int64)
        if not self._keeps_lanes(world_size):
            return lanes
        rank = lanes % world_size
        return lanes[(first_rank <= rank) & (rank < first_rank + num_ranks)]

    def _keeps_lanes(self, world_size: int) -> bool:
        """Whether every rank can have lanes of its own."""
        return (
            self.lanes > 0
            and self._micro % (world_size * PARTNERS) == 0
            and self.lanes % world_size == 0
        )

    def _share(self, shard: Shard) -> NDArray[np.int64]:
        """Return which positions of a micro-batch a rank has, int64, rising."""
        rank, world_size, group = shard.rank, shard.world_size, self.mix_group
        if self._keeps_lanes(world_size):
            first = np.arange(rank * PARTNERS, self._micro, world_size * PARTNERS, dtype=np.int64)
            return np.add.outer(first, np.arange(PARTNERS, dtype=np.int64)).ravel()
        start, end = (self._groups * r // world_size for r in (rank, rank + 1))
        return np.arange(start * group, end * group, dtype=np.int64)


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
