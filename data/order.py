"""The order of training: which sample stands at which position of an epoch.

Two shuffles: `FullShuffle`, of all samples, for data that is at hand; and `StreamShuffle`, for
data that is far away, which reads shards one after the other in many lanes. Invariant: the sample
at position p of epoch e is a pure function of (seed, e, p) and the sizes of the shards: it depends
neither on the number of processes nor on history, and is found without looking at other positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.base import DataError, Source
from data.permutation import ROUNDS, permute
from data.randomness import Purpose, random_bits

PARTNERS = 2  # neighbouring positions that lie in one lane, as they may be mixed with each other
_REPEAT_BLOCK = 64  # images whose copies stand together when samples are repeated
_MIXED = 0.5  # of the class entropy that a shard could have, the least that a shuffled one has
_NEVER = np.int64(1) << np.int64(62)


class Shuffle(Protocol):
    """A seeded order of all samples, another one in each epoch."""

    @property
    def lanes(self) -> int:
        """How many interleaved sequences of shards it reads: 0 where it knows no shards."""
        ...

    @property
    def window(self) -> int:
        """Within how many consecutive samples of a lane it shuffles, or 0."""
        ...

    @property
    def num_positions(self) -> int:
        """How many samples have a position in an epoch."""
        ...

    def ids(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample ids at `positions` (each in [0, num_positions)), same shape, int64."""
        ...

    def left_out(self, epoch: int) -> NDArray[np.int64]:
        """Return the ids that have no position in `epoch`, int64."""
        ...

    def next_use(self, epoch: int, place: int, lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return in how many places of a lane each shard is next read by any of `lanes`.

        It is asked at `place` of `epoch`. int64 [num_shards], or one number for all shards.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FullShuffle:
    """A permutation of `num_samples` ids. Memory is O(1) in their number."""

    num_samples: int
    seed: int
    lanes: int = field(default=0, init=False)
    window: int = field(default=0, init=False)

    @property
    def num_positions(self) -> int:
        """All samples have one."""
        return self.num_samples

    def ids(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Shuffle`."""
        keys = random_bits(self.seed, epoch, 0, Purpose.ORDER, count=ROUNDS)
        return permute(positions, self.num_samples, keys)

    def left_out(self, epoch: int) -> NDArray[np.int64]:
        """None: every sample has a position."""
        return np.empty(0, np.int64)

    def next_use(self, epoch: int, place: int, lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        """At any moment any shard may be next."""
        return np.zeros(1, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamShuffle:
    """An order that reads few shards at a time: their order is shuffled, then samples locally.

    The shards of `shard_sizes` int64 [num_shards], permuted, lie end to end and are cut into
    `lanes` equal parts; what does not divide is left out, other samples in each epoch. Partners,
    positions 2j and 2j+1, are neighbours in lane j mod lanes, at places from 2 (j div lanes) on;
    in a lane samples are shuffled within windows of about `window` consecutive ones. Memory is
    O(num_shards). Raises DataError for fewer samples than two a lane.
    """

    shard_sizes: NDArray[np.int64]
    seed: int
    lanes: int = 64
    window: int = 16_384

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.window < 1:
            raise DataError(f"lanes {self.lanes} and window {self.window} must be at least 1")
        if self.lane_length < 1:
            raise DataError(
                f"{self.shard_sizes.sum()} samples do not fill {self.lanes} lanes with two each: "
                "use fewer"
            )

    @property
    def lane_length(self) -> int:
        """Number of samples in a lane."""
        return int(self.shard_sizes.sum()) // (self.lanes * PARTNERS) * PARTNERS

    @property
    def num_positions(self) -> int:
        """Samples in all lanes."""
        return self.lane_length * self.lanes

    def ids(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Shuffle`."""
        pair, member = np.divmod(positions, PARTNERS)
        lane, place = pair % self.lanes, pair // self.lanes * PARTNERS + member
        window = self._window(place)
        start, end = self._window_start(window), self._window_start(window + 1)
        number = lane * self._num_windows + window
        keys = random_bits(self.seed, epoch, number, Purpose.WINDOWS, count=ROUNDS)
        place = start + permute(place - start, end - start, keys)
        return self._ids_along(epoch, lane * self.lane_length + place)

    def left_out(self, epoch: int) -> NDArray[np.int64]:
        """See `Shuffle`: what lies behind the last lane."""
        return self._ids_along(epoch, np.arange(self.num_positions, self.shard_sizes.sum()))

    def next_use(self, epoch: int, place: int, lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Shuffle`.

        0 is within the windows that stand at `place` of `epoch`; shards that are read neither in
        this epoch nor in the next get two lane lengths. int64 [num_shards].
        """
        now, following = (self._uses(epoch + later, lanes) for later in (0, 1))
        start, end = now
        soon = np.where(end > place, np.maximum(start - place, 0), _NEVER)
        later = self.lane_length - place + following[0]
        limit = np.full_like(self.shard_sizes, 2 * self.lane_length)
        nearest: NDArray[np.int64] = np.concatenate([soon, later, limit[None]]).min(axis=0)
        return nearest

    def _uses(
        self, epoch: int, lanes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places [start, end) at which each lane reads each shard: [lanes, shards].

        They are those of whole windows; where a lane does not read a shard, start is far beyond
        any place and end is 0.
        """
        shards, ends = self._layout(epoch)
        first = lanes[:, None] * self.lane_length
        start = np.clip(ends - self.shard_sizes[shards] - first, 0, self.lane_length)
        end = np.clip(ends - first, 0, self.lane_length)
        used = end > start
        start = np.where(used, self._window_start(self._window(start)), _NEVER)
        end = np.where(used, self._window_start(self._window(end - 1) + 1), 0)
        inverse = np.argsort(shards)
        return start[:, inverse], end[:, inverse]

    def _window(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which window of its lane a place lies in."""
        return ((place + 1) * self._num_windows - 1) // self.lane_length

    def _window_start(self, window: NDArray[np.int64]) -> NDArray[np.int64]:
        return window * self.lane_length // self._num_windows

    @property
    def _num_windows(self) -> int:
        """Windows of a lane: of equal length to within one sample, at most `window`."""
        return -(-self.lane_length // self.window)

    def _ids_along(self, epoch: int, along: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids at places of the shards laid end to end."""
        shards, ends = self._layout(epoch)
        index = np.searchsorted(ends, along, side="right")
        shard = shards[index]
        row = along - (ends[index] - self.shard_sizes[shard])
        return self._first_ids[shard] + row

    @cached_property
    def _first_ids(self) -> NDArray[np.int64]:
        return np.cumsum(self.shard_sizes) - self.shard_sizes

    def _layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards in the order of an epoch, and where each ends along them."""
        return _layout(self, epoch)


@lru_cache(maxsize=8)
def _layout(shuffle: StreamShuffle, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    count = len(shuffle.shard_sizes)
    keys = random_bits(shuffle.seed, epoch, 0, Purpose.SHARDS, count=ROUNDS)
    shards = permute(np.arange(count), count, keys)
    return shards, np.cumsum(shuffle.shard_sizes[shards])


@dataclass(frozen=True, kw_only=True)
class Order:
    """A shuffle whose samples may be repeated.

    With `repeats` above 1 an epoch shows 1/repeats of the samples, each that many times (Hoffer
    et al., arXiv:1901.09335): 64 samples, then the same ones again, moved up by one place so that
    a copy has another partner than the copy before it.
    """

    shuffle: Shuffle
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise DataError(f"repeats {self.repeats} must be at least 1")

    def ids(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample ids at `positions` (each in [0, num_positions)), same shape, int64."""
        if self.repeats == 1:
            return self.shuffle.ids(epoch, positions)
        block = positions // (_REPEAT_BLOCK * self.repeats) * _REPEAT_BLOCK
        place = (positions + self.copies(positions)) % _REPEAT_BLOCK
        return self.shuffle.ids(epoch, block + place)

    def copies(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which copy of its sample stands at each position: int64 in [0, repeats)."""
        return positions // _REPEAT_BLOCK % self.repeats


def stream_shuffle(
    source: Source, *, seed: int, lanes: int, window: int, allow_unmixed: bool = False
) -> StreamShuffle:
    """Return the shuffle that reads `source` shard by shard.

    Raises DataError if its shards hold few classes each, which windows cannot mix: their classes
    have on average less than half of the entropy that random samples would have.
    """
    found, possible = _class_entropy(source)
    if found < _MIXED * possible and not allow_unmixed:
        raise DataError(
            f"the shards are sorted by class: {found:.1f} bits of class entropy per shard, where "
            f"shuffled ones would have up to {possible:.1f}, so that batches would hold few "
            "classes; pack the data again (`foveate data pack` shuffles), use the full order, or "
            "allow it"
        )
    return StreamShuffle(shard_sizes=source.shard_sizes, seed=seed, lanes=lanes, window=window)


def _class_entropy(source: Source) -> tuple[float, float]:
    """Return the mean entropy of the classes in a shard, and the most it could be, in bits."""
    sizes = source.shard_sizes
    parts = np.split(source.labels, np.cumsum(sizes)[:-1])
    found = np.average([entropy_bits(part) for part in parts], weights=sizes)
    return float(found), min(entropy_bits(source.labels), math.log2(sizes.mean()))


def entropy_bits(labels: NDArray[np.integer[Any]]) -> float:
    """Return the entropy of a sample's class in bits."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log2(shares)).sum())
