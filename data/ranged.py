"""Shards read where they are, sample by sample, with requests for ranges of bytes.

Owns what was asked for ahead of reading. Needs no disk, and makes one request per sample: the
regions of JPEG files are left where they are, for fetching them costs a second request, and more
than decoding the whole file does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from data.index import ShardInfo
from data.remote import Remote, finish
from data.store import Place

_PLANNED = 64  # batches whose samples are kept until they are read: more than a loader is ahead


class RangedStore:
    """The `Store` over the shards below a URL without a cache folder."""

    def __init__(self, remote: Remote, shards: Sequence[ShardInfo]) -> None:
        self._remote = remote
        self._shards = shards
        self._lock = threading.Lock()
        self._begun: dict[Place, tuple[Future[bytes], int]] = {}  # and how often it will be read
        self._batches: deque[list[Place]] = deque()

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """See `Store`."""
        place = (shard, offset, num_bytes)
        with self._lock:
            begun, reads = self._begun.pop(place, (None, 0))
            if begun is not None and reads > 1:
                self._begun[place] = (begun, reads - 1)
        return finish(begun or self._start(*place))

    def read_again(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """See `Store`."""
        return finish(self._start(shard, offset, num_bytes))

    def read_regions(self, shard: int, row: int, crc32: int) -> bytes | None:
        """See `Store`: none are at hand."""
        return None

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """Nothing is fetched by the shard."""

    def prefetch(self, places: Iterable[Place]) -> None:
        """See `Store`."""
        batch = list(places)
        with self._lock:
            for place in batch:
                begun, reads = self._begun.get(place) or (self._start(*place), 0)
                self._begun[place] = (begun, reads + 1)
            self._batches.append(batch)
            if len(self._batches) > _PLANNED:  # some were never read: they were in quarantine
                for place in self._batches.popleft():
                    self._begun.pop(place, None)

    def close(self) -> None:
        """See `Store`."""
        with self._lock:
            self._begun.clear()
            self._batches.clear()
        self._remote.close()

    def _start(self, shard: int, offset: int, num_bytes: int) -> Future[bytes]:
        name = self._shards[shard].name
        return self._remote.start(name, start=offset, end=offset + num_bytes)
