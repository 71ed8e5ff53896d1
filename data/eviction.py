"""Which shards a cache holds: those whose next use is nearest, as the order of training is known.

Pure arithmetic over next uses and sizes. Shards of equal next use count as used in the order of
their numbers. Belady's rule (1966): no other choice of what to evict makes fewer downloads.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from data.base import DataError

_NEXT = 2  # shards there must be room for beyond those that are read now


def by_next_use(next_use: NDArray[np.int64]) -> list[int]:
    """Return all shards, the one that is used first in front."""
    order: list[int] = np.argsort(next_use, kind="stable").tolist()
    return order


def wanted(next_use: NDArray[np.int64], sizes: NDArray[np.int64], limit: float) -> list[int]:
    """Return the shards to hold, the one that is used first in front: as many as fit in `limit`."""
    order = by_next_use(next_use)
    fit = int((np.cumsum(sizes[order]) <= limit).sum())
    return order[:fit]


def removable(
    held: Collection[int], next_use: NDArray[np.int64], shard: int, *, at_once: bool
) -> list[int]:
    """Return which of the `held` may make room for `shard`, the one that is used last in front.

    Those are the ones used after it; where it is read `at_once`, all others.
    """
    rank = {shard: rank for rank, shard in enumerate(by_next_use(next_use))}
    others = [other for other in held if other != shard]
    if not at_once:
        others = [other for other in others if rank[other] > rank[shard]]
    return sorted(others, key=rank.__getitem__, reverse=True)


def check_room(
    next_use: NDArray[np.int64], sizes: NDArray[np.int64], room: float, *, place: str
) -> None:
    """Raise DataError unless `room` bytes hold the shards that are read now and the next two."""
    now = int((next_use == 0).sum())
    least = by_next_use(next_use)[: now + _NEXT]
    needed = int(sizes[least].sum())
    if needed > room:
        raise DataError(
            f"the cache {place} has room for {room / 1e9:.3f} GB, but {now} shards that are read "
            f"at a time and the next {len(least) - now} take {needed / 1e9:.3f} GB: give it as "
            "much on a disk that holds it, use fewer lanes or smaller windows, or read without a "
            "cache folder"
        )
