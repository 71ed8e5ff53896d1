"""A folder of shards that the processes of a machine share: its files, leases and room.

    <shard>.tar  <shard>.roi            whole: renamed into place once verified
    <shard>.tar.part.<host>.<process>   being downloaded, of its full size from the start
    leases/<shard>.tar                  locked by who downloads or removes the shard
    room.lock                           locked by who makes room

A lease is a lock of the kernel on an empty file, not the file: the kernel releases it when its
owner ends in whatever way, so that no crash leaves one behind, and none expires while its owner
is merely slow. Invariants: whoever writes or removes a shard holds its lease; nobody waits for a
lease while making room, so that no two wait for one another.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from data.base import DataError
from data.index import ShardInfo

_FULL = (errno.ENOSPC, errno.EDQUOT)


class CacheFolder:
    """The folder at `path`, which holds up to `limit` bytes of `shards`.

    `forget` is called with each shard that was removed here, to close it: an open file keeps its
    place on the disk. Parts that dead processes left behind are removed. Raises DataError if the
    folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        shards: Sequence[ShardInfo],
        limit: float,
        *,
        forget: Callable[[int], None],
    ) -> None:
        self.path = path
        self._limit = limit
        self._shards = shards
        self._forget = forget
        self._numbers = {shard.name: number for number, shard in enumerate(shards)}
        self._numbers |= {_regions_name(shard): number for number, shard in enumerate(shards)}
        try:
            (path / "leases").mkdir(parents=True, exist_ok=True)
            with self._making_room():
                self._scan(mine=None)
        except OSError as error:
            raise unusable(path, error) from error

    def lease(self, shard: int) -> AbstractContextManager[bool]:
        """Hold the lease of a shard; gives False if another one has it."""
        return locked(self.path / "leases" / self._shards[shard].name, wait=False)

    def held(self) -> set[int]:
        """Return the shards that are there."""
        names = {entry.name for entry in os.scandir(self.path)}
        return {number for number, shard in enumerate(self._shards) if shard.name in names}

    def room(self) -> float:
        """Return how many bytes of shards could lie here: no more than the disk has."""
        with self._making_room():
            held, parts = self._scan(mine=None)
        disk = os.statvfs(self.path)
        return min(self._limit, sum(held.values()) + parts + disk.f_bavail * disk.f_frsize)

    def part(self, name: str) -> Path:
        """Return where to write a file until it is whole."""
        return self.path / f"{name}.part.{socket.gethostname()}.{os.getpid()}"

    def reserve(
        self, shard: int, removable: Callable[[list[int]], list[int]], *, at_once: bool
    ) -> bool:
        """Make the part of a shard in its full size; we hold its lease.

        Of the shards that are there, those that `removable` returns go first, one after the other,
        as far as the limit or a full disk asks for it. Where that is not enough, one that is
        needed `at_once` exceeds the limit, and raises DataError if the disk is full; another one
        is left: returns False.
        """
        num_bytes = self._shards[shard].num_bytes
        with self._making_room():
            held, parts = self._scan(mine=shard)
            used = sum(held.values()) + parts
            candidates = deque(removable(list(held)))
            least = used - sum(held[candidate] for candidate in candidates)
            if least + num_bytes > self._limit and not at_once:
                return False
            while used + num_bytes > self._limit and candidates:
                candidate = candidates.popleft()
                used -= held[candidate] if self._remove(candidate) else 0
            while not self._allocate(shard):
                if candidates:
                    self._remove(candidates.popleft())
                elif at_once:
                    raise DataError(
                        f"the disk of {self.path} is full: {self._shards[shard].name} needs "
                        f"{num_bytes} bytes, and no other shard is left to make room; free some, "
                        "or choose another cache_dir"
                    )
                else:
                    return False
        return True

    def _remove(self, shard: int) -> bool:
        """Remove a shard unless somebody has its lease; who has it open reads on."""
        with self.lease(shard) as leased:
            if leased:
                self.remove(shard)
        return leased

    def remove(self, shard: int) -> None:
        """Remove a shard; we hold its lease, and who has it open reads on."""
        self._forget(shard)
        (self.path / self._shards[shard].name).unlink(missing_ok=True)
        (self.path / _regions_name(self._shards[shard])).unlink(missing_ok=True)

    def _allocate(self, shard: int) -> bool:
        """Whether the disk had room for the part of a shard."""
        part = self.part(self._shards[shard].name)
        with part.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._shards[shard].num_bytes)
            except OSError as error:
                part.unlink()
                if error.errno in _FULL:
                    return False
                raise
        return True

    def _scan(self, mine: int | None) -> tuple[dict[int, int], int]:
        """Return shard -> bytes of those that are there, and the bytes of unfinished parts.

        Removes the parts that nobody writes any more; those of `mine`, whose lease we hold, too.
        """
        held: dict[int, int] = {}
        parts = 0
        for entry in list(os.scandir(self.path)):
            name, part, _ = entry.name.partition(".part.")
            number = self._numbers.get(name)
            if number is None:
                continue
            try:
                if not part:
                    held[number] = held.get(number, 0) + entry.stat().st_size
                elif number == mine:
                    os.unlink(entry)
                else:
                    parts += self._size_unless_abandoned(number, entry)
            except FileNotFoundError:
                continue  # renamed or removed since
        return held, parts

    def _size_unless_abandoned(self, shard: int, part: os.DirEntry[str]) -> int:
        with self.lease(shard) as abandoned:
            if abandoned:
                os.unlink(part)
                return 0
        return part.stat().st_size

    def _making_room(self) -> AbstractContextManager[bool]:
        return locked(self.path / "room.lock")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a file, made if need be; yields False if another one has it and we do not `wait`."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _lock(file, wait=wait)
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile has the file open too
        os.close(file)


def unusable(path: Path, error: OSError) -> DataError:
    """Return the error to raise where the disk fails."""
    return DataError(
        f"the cache {path} cannot be used ({error}): mend that, or choose another cache_dir"
    )


def _lock(file: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _regions_name(shard: ShardInfo) -> str:
    return Path(shard.name).with_suffix(".roi").name
