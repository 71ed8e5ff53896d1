"""Shards of a URL, downloaded whole into a cache folder before they are read.

Owns what is downloaded when. Invariants: a shard lies in the folder under its name only when it is
whole and has its hash; the processes of a machine, which share the folder, download it once; what
is held is what will be read soonest, as far as `expect` told. A shard that is read but not there
is downloaded at once, so that a plan saves time and never decides what is read.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.base import DataError, Stopped
from data.cachefolder import CacheFolder, unusable
from data.eviction import check_room, removable, wanted
from data.index import ShardInfo, hash_file
from data.remote import Remote
from data.store import OpenShards, Place, ShardFile

_DOWNLOADS = 3  # of a shard that is whole but has another hash
_GLANCE = 0.1  # seconds of waiting at a time, for others and for a thread to end


class CachedStore:
    """The `Store` over the shards of `remote` that keeps up to `limit` bytes in `folder`.

    Before anybody has said what is read next, shards are expected in the order of their numbers.
    Raises DataError if the folder cannot be written, or the limit is below a shard.
    """

    def __init__(
        self, remote: Remote, shards: Sequence[ShardInfo], folder: Path, limit: int | None
    ) -> None:
        self._remote = remote
        self._shards = shards
        self._sizes = np.array([shard.num_bytes for shard in shards], np.int64)
        self._limit = math.inf if limit is None else limit
        if self._sizes.max() > self._limit:
            raise DataError(
                f"a cache_gb of {self._limit / 1e9:g} holds no shard of {remote.url}, of which the "
                f"largest takes {self._sizes.max() / 1e9:.3g} GB: give the cache more"
            )
        self._files = OpenShards(self._open)
        self._folder = CacheFolder(folder, shards, self._limit, forget=self._files.drop)
        self._next_use = np.zeros(len(shards), np.int64)
        self._is_checked = False
        self._lock = threading.Lock()
        self._ahead: threading.Thread | None = None

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """See `Store`: downloads the shard unless it is there."""
        with self._working():
            return self._files.get(shard).read(offset, num_bytes)

    def read_again(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """See `Store`: a shard that lost its hash, on a disk that decays, is downloaded again.

        The file that is open may be one that another process has replaced already.
        """
        info = self._shards[shard]
        path = self._folder.path / info.name
        with self._working(), self._leased(shard), suppress(FileNotFoundError):
            sound = path.stat().st_size == info.num_bytes and _has_hash(info, hash_file(path))
            if not sound:
                self._folder.remove(shard)
        self._files.drop(shard)
        return self.read(shard, offset, num_bytes)

    def read_regions(self, shard: int, row: int, crc32: int) -> bytes | None:
        """See `Store`: none of a shard that was evicted since the sample was read."""
        file = self._files.peek(shard)
        return None if file is None else file.read_regions(row, crc32)

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """See `Store`: downloads what is read soonest, and keeps it as long as it is.

        The first time, raises DataError unless the folder has room for what is read at a time.
        """
        if not self._is_checked:
            with self._working():
                room = self._folder.room()
            check_room(next_use, self._sizes, room, place=str(self._folder.path))
            self._is_checked = True
        self._files.drop_removed()
        with self._lock:
            self._next_use = next_use
            is_alive = self._ahead is not None and self._ahead.is_alive()  # not in a fork
            if not is_alive:
                self._ahead = threading.Thread(
                    target=self._download_ahead, name="foveate-cache", daemon=True
                )
                self._ahead.start()

    def prefetch(self, places: Iterable[Place]) -> None:
        """Shards are fetched whole."""

    def close(self) -> None:
        """See `Store`: what was downloaded in part is removed."""
        with self._lock:
            ahead = self._ahead
        self._remote.close()
        while ahead is not None and ahead.is_alive():
            ahead.join(_GLANCE)
            self._remote.close()  # it may have been between two requests

    def _open(self, shard: int) -> ShardFile:
        """Return a shard from the folder, downloading it first unless it is there."""
        with suppress(FileNotFoundError):
            return ShardFile(self._folder.path, self._shards[shard])
        with self._leased(shard):
            if not self._is_held(shard):
                self._download(shard, at_once=True)
            return ShardFile(self._folder.path, self._shards[shard])

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Word what goes wrong with the disk."""
        try:
            yield
        except OSError as error:
            raise unusable(self._folder.path, error) from error

    @contextmanager
    def _leased(self, shard: int) -> Iterator[None]:
        """Hold the lease of a shard as soon as nobody else does; raises Stopped if closed before.

        The kernel's own waiting for a lock could not be ended.
        """
        while True:
            with self._folder.lease(shard) as leased:
                if leased:
                    yield
                    return
            self._remote.pause(_GLANCE)

    def _is_held(self, shard: int) -> bool:
        return (self._folder.path / self._shards[shard].name).exists()

    def _download_ahead(self) -> None:
        """Download what is wanted and not there, until the plan is fulfilled or we are closed."""
        with suppress(Stopped):
            while True:
                plan = self._next_use
                with suppress(OSError):  # of the disk, which stops who reads, too
                    self._fulfil(plan)
                with self._lock:
                    if plan is self._next_use:
                        self._ahead = None
                        return

    def _fulfil(self, plan: NDArray[np.int64]) -> None:
        """Download what is wanted; what cannot be had is left to who reads it, and tells why."""
        held = self._folder.held()
        for shard in wanted(plan, self._sizes, self._limit):
            if plan is not self._next_use:
                return
            if shard in held:
                continue
            with self._folder.lease(shard) as leased, suppress(DataError):
                if not leased or self._is_held(shard):
                    continue  # another process is at it, or was
                if not self._download(shard, at_once=False):
                    return

    def _download(self, shard: int, *, at_once: bool) -> bool:
        """Download a shard whose lease we hold; returns False if there is no room for it."""
        info = self._shards[shard]
        choose = partial(removable, next_use=self._next_use, shard=shard, at_once=at_once)
        if not self._folder.reserve(shard, choose, at_once=at_once):
            return False
        part = self._folder.part(info.name)
        try:
            self._fill(part, info)
            self._fetch_regions(info)
            part.replace(self._folder.path / info.name)
        finally:
            part.unlink(missing_ok=True)
        return True

    def _fill(self, part: Path, info: ShardInfo) -> None:
        """Download into `part` until its hash is right."""
        for _ in range(_DOWNLOADS):
            digest = hashlib.sha256()
            with part.open("r+b") as file:
                for content in self._remote.stream(info.name, info.num_bytes):
                    file.write(content)
                    digest.update(content)
                file.flush()
                os.fsync(file.fileno())
            if _has_hash(info, digest.hexdigest()):
                return
        raise DataError(
            f"{self._remote.url}/{info.name} has the SHA-256 {digest.hexdigest()} instead of "
            f"{info.sha256}, in each of {_DOWNLOADS} downloads: restore the shard, or run `foveate "
            f"data index {self._remote.url}`"
        )

    def _fetch_regions(self, info: ShardInfo) -> None:
        """Fetch what lets parts of the images be decoded alone; it only ever saves time."""
        name = Path(info.name).with_suffix(".roi").name
        part = self._folder.part(name)
        with suppress(DataError, OSError):
            part.write_bytes(self._remote.read(name))
            part.replace(self._folder.path / name)
        part.unlink(missing_ok=True)


def _has_hash(info: ShardInfo, sha256: str) -> bool:
    """Whether a shard has its hash; a set that was indexed from afar has none."""
    return info.sha256 in (None, sha256)
