"""Where the bytes of shards come from: the `Store` protocol, and shards that lie in a folder.

Owns the open files of shards. Files are read, not memory-mapped: a map keeps a descriptor for
ever, lets nobody else run while a page comes in, and kills the process when a file shrinks.
"""

from __future__ import annotations

import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.base import DataError
from data.index import ShardInfo
from data.regions import Regions

Place = tuple[int, int, int]  # shard, offset, number of bytes


class Store(Protocol):
    """The bytes of a set of shards, which are numbered in the manifest's order.

    Any thread may read. What cannot be read raises DataError naming the shard and the remedy.
    """

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """Return `num_bytes` from `offset` on."""
        ...

    def read_again(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """Return the same from the origin, when what `read` returned turned out to be damaged."""
        ...

    def read_regions(self, shard: int, row: int, crc32: int) -> bytes | None:
        """Return the regions of a sample whose bytes have this CRC, if there are any at hand."""
        ...

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """Be told in how many places each shard is next read: 0 is now."""
        ...

    def prefetch(self, places: Iterable[Place]) -> None:
        """Be told that these are read next; returns at once."""
        ...

    def close(self) -> None:
        """End what is under way: reads that wait raise Stopped. Later ones are read as before."""
        ...


class LocalStore:
    """Shards in a folder, opened when first read."""

    def __init__(self, folder: Path, shards: Sequence[ShardInfo]) -> None:
        self._folder = folder
        self._shards = shards
        self._files = OpenShards(lambda shard: ShardFile(folder, shards[shard]))

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """See `Store`."""
        try:
            return self._files.get(shard).read(offset, num_bytes)
        except OSError as error:
            path = self._folder / self._shards[shard].name
            raise DataError(f"{path} cannot be read ({error}); restore it") from error

    def read_again(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """See `Store`: the folder is the origin."""
        return self.read(shard, offset, num_bytes)

    def read_regions(self, shard: int, row: int, crc32: int) -> bytes | None:
        """See `Store`."""
        return self._files.get(shard).read_regions(row, crc32)

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """Nothing needs to be fetched."""

    def prefetch(self, places: Iterable[Place]) -> None:
        """Nothing needs to be fetched."""

    def close(self) -> None:
        """Nothing was begun."""


class ShardFile:
    """A shard and its regions, which any thread may read, closed once nobody refers to them."""

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        path = folder / info.name
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._regions = Regions(path, num_samples=info.num_samples, index_sha256=info.index_sha256)
        weakref.finalize(self, self._regions.close)

    @property
    def is_removed(self) -> bool:
        """Whether the file has no name any more, and keeps its disk space only by being open."""
        return os.fstat(self._descriptor).st_nlink == 0

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return `num_bytes` from `offset` on, fewer at the end of the file."""
        return os.pread(self._descriptor, num_bytes, offset)

    def read_regions(self, row: int, crc32: int) -> bytes | None:
        """Return the regions of a sample whose bytes have this CRC, if it has any."""
        return self._regions.read(row, crc32)


class OpenShards:
    """The shards that are open, as many as the process's limit of open files allows."""

    def __init__(self, open_shard: Callable[[int], ShardFile]) -> None:
        self._open_shard = open_shard
        self._limit = _max_open_shards()
        self._lock = threading.Lock()
        self._files: OrderedDict[int, ShardFile] = OrderedDict()  # the last one was read last

    def get(self, shard: int) -> ShardFile:
        """Return the open shard, opening it if need be."""
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        file = self._open_shard(shard)  # may take as long as a download: others go on meanwhile
        with self._lock:
            self._files[shard] = file
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        return file

    def peek(self, shard: int) -> ShardFile | None:
        """Return the shard if it is open."""
        with self._lock:
            return self._files.get(shard)

    def drop(self, shard: int) -> None:
        """Close a shard as soon as nobody reads it."""
        with self._lock:
            self._files.pop(shard, None)

    def drop_removed(self) -> None:
        """Close the shards whose files were removed, so that their disk space is freed."""
        with self._lock:
            for shard in [shard for shard, file in self._files.items() if file.is_removed]:
                del self._files[shard]


def _max_open_shards() -> int:
    """An eighth of the open files that the process may have.

    A shard takes two, so that two sources leave half to others.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if limit == resource.RLIM_INFINITY else max(1, limit // 8)
