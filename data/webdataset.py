"""Random access to samples in indexed shards, tars (the WebDataset layout) or betons, near or far.

Owns how a set is opened. Invariant: sample ids number the samples shard after shard in the
manifest's order, and a sample whose bytes do not match their CRC, where the index has one, is
never returned.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from data.base import BadSample, DataError, Sample, Source
from data.cache import CachedStore
from data.cachefolder import locked, unusable
from data.columns import Columns, Flag, write_atomically
from data.index import (
    MANIFEST,
    Manifest,
    ShardInfo,
    check_index,
    check_shard,
    index_name,
    read_columns,
    sample_name,
)
from data.ranged import RangedStore
from data.remote import Remote, finish
from data.store import LocalStore, Place, Store
from data.tar import sample_members


class TarSource:
    """The `Source` over tar or .beton shards with their manifest: in a folder, or below a URL.

    A folder's shards are read where they lie, or where its manifest says they do. Those of a URL
    (s3, gs, http, https, file) are downloaded whole into `cache_dir`, which processes may share and
    which is kept within `cache_bytes` if given; without a cache folder each sample is requested by
    itself.
    Opening checks the hash of every index, and the size of every shard in a folder; reading checks
    the sample's CRC. Raises DataError naming the shard and the remedy.
    """

    def __init__(
        self,
        location: str | Path,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._opened_as = (location, cache_dir, cache_bytes)
        self._columns: list[Columns]
        self._store: Store
        if "://" in str(location):
            remote = Remote(str(location))
            manifest = _fetch_manifest(remote)
            folder = _cache_folder(cache_dir, manifest)
            self._location = remote.url
            self._columns = _fetch_columns(remote, manifest.shards, folder)
            self._store = _far_store(remote, manifest.shards, folder, cache_bytes)
        else:
            near = Path(location)
            manifest = Manifest.load(near)
            place = manifest.location(near)
            self._location = place.url
            check = check_shard if manifest.base is None else check_index
            self._columns = [check(near, shard) for shard in manifest.shards]
            if place.folder is not None:
                self._store = LocalStore(place.folder, manifest.shards)
            else:
                remote, folder = Remote(place.url), _cache_folder(cache_dir, manifest)
                self._store = _far_store(remote, manifest.shards, folder, cache_bytes)
        self._shards = manifest.shards
        self.shard_sizes = manifest.shard_sizes
        self._ends = np.cumsum([shard.num_samples for shard in manifest.shards])
        self.fingerprint = manifest.fingerprint
        self.classes = manifest.classes
        self.labels: NDArray[np.int64] = np.concatenate(
            [columns["label"] for columns in self._columns]
        ).astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open it again where it is sent: open files cannot be."""
        return TarSource, self._opened_as

    def __len__(self) -> int:
        return int(self._ends[-1])

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """See `Source`; the first time, raises DataError if the cache is too small for it."""
        if len(next_use) == len(self._shards):  # else they are those of the set's origin
            self._store.expect(next_use)

    def prefetch(self, ids: Sequence[int]) -> None:
        """See `Source`."""
        wanted = (place for place in map(self._locate, ids) if not self._is_damaged(*place))
        self._store.prefetch(self._place(*place) for place in wanted)

    def close(self) -> None:
        """See `Source`."""
        self._store.close()

    def read(self, id: int) -> Sample:
        """Return sample `id`.

        Raises BadSample naming shard and member if its bytes changed, or were damaged from the
        first.
        """
        shard, row = self._locate(id)
        if self._is_damaged(shard, row):
            raise BadSample(
                f"{self.name(id)} was damaged before it was indexed; replace the image, and run "
                f"`foveate data index {self._location}`"
            )
        return self.read_stored(id)

    def read_stored(self, id: int) -> Sample:
        """Return sample `id` as it was indexed, damaged or not; raises BadSample if it changed."""
        shard, row = self._locate(id)
        columns, crc32 = self._columns[shard], int(self._columns[shard]["crc32"][row])
        place = self._place(shard, row)
        label, flags = int(columns["label"][row]), Flag(int(columns["flags"][row]))

        def is_sound(image: bytes) -> bool:
            return len(image) == place[2] and (Flag.NO_CRC in flags or zlib.crc32(image) == crc32)

        image = self._store.read(*place)
        if not is_sound(image):
            image = self._store.read_again(*place)
        if not is_sound(image):
            raise BadSample(
                f"{self.name(id)} has changed since it was indexed; restore the shard, or run "
                f"`foveate data index {self._location}`"
            )
        if Flag.RAW in flags:
            shape = (int(columns["height"][row]), int(columns["width"][row]), 3)
            return Sample(id=id, image=np.frombuffer(image, np.uint8).reshape(shape), label=label)
        regions = self._store.read_regions(shard, row, crc32)
        return Sample(id=id, image=image, label=label, regions=regions)

    @property
    def has_names(self) -> bool:
        """Whether each sample has a name of its own, as those in tars may."""
        keys = np.concatenate([columns["key"] for columns in self._columns])
        return self.is_tar and len(np.unique(keys)) == len(keys)

    @property
    def is_tar(self) -> bool:
        """Whether all shards are tars, whose samples have names and may have further members."""
        return all(shard.name.endswith(".tar") for shard in self._shards)

    def read_members(self, id: int) -> tuple[str | None, dict[str, bytes]]:
        """Return the name of sample `id` in a tar and, by suffix, its members beside the image.

        As WebDataset has it, these are the members of its name that lie next to it. The name is
        None where the image is a link.
        """
        shard, row = self._locate(id)
        columns = self._columns[shard]
        offsets, offset = columns["offset"], columns["offset"][row]
        before, after = offsets < offset, offsets[offsets > offset]
        start = int((offsets + columns["size"])[before].max(initial=0))
        end = int(after.min(initial=self._shards[shard].num_bytes))
        part = _Part(partial(self._store.read, shard), -(-start // 512) * 512, end)
        return sample_members(cast(IO[bytes], part), int(columns["key"][row]))

    def name(self, id: int) -> str:
        """Return `SHARD:MEMBER (sample id)`, where the member of a .beton is its number in it."""
        shard, row = self._locate(id)
        info = self._shards[shard]
        member = sample_name(info, row, self._columns[shard], partial(self._store.read, shard))
        return f"{self._location}/{info.name}:{member} (sample {id})"

    def _locate(self, id: int) -> tuple[int, int]:
        """Return the shard's index and the row in it."""
        shard = int(np.searchsorted(self._ends, id, side="right"))
        return shard, id - int(self._ends[shard] - self._shards[shard].num_samples)

    def _is_damaged(self, shard: int, row: int) -> bool:
        return bool(int(self._columns[shard]["flags"][row]) & Flag.CORRUPT)

    def _place(self, shard: int, row: int) -> Place:
        columns = self._columns[shard]
        return shard, int(columns["offset"][row]), int(columns["size"][row])


def read_stored(source: Source, id: int) -> Sample:
    """Return sample `id` for packing: one that was damaged when it was indexed stays so."""
    return source.read_stored(id) if isinstance(source, TarSource) else source.read(id)


class _Part(io.RawIOBase):
    """The bytes of a shard from `start` to `end` as a file, of which little may be read."""

    def __init__(self, read: Callable[[int, int], bytes], start: int, end: int) -> None:
        self._read, self._start, self._end, self._at = read, start, end, start

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "tarfile knows where it is"
        self._at = self._start + offset
        return offset

    def tell(self) -> int:
        return self._at - self._start

    def read(self, size: int = -1) -> bytes:
        content = self._read(self._at, max(0, min(size, self._end - self._at)))
        self._at += len(content)
        return content


def _cache_folder(cache_dir: str | Path | None, manifest: Manifest) -> Path | None:
    return None if cache_dir is None else Path(cache_dir) / manifest.sha256


def _far_store(
    remote: Remote, shards: Sequence[ShardInfo], folder: Path | None, cache_bytes: int | None
) -> Store:
    """Return the store of shards below a URL: through a cache `folder`, or without one."""
    _check_names(remote, shards)
    if folder is None:
        return RangedStore(remote, shards)
    return CachedStore(remote, shards, folder, cache_bytes)


def _fetch_manifest(remote: Remote) -> Manifest:
    manifest = Manifest.parse(remote.read(MANIFEST), remote.url)
    _check_names(remote, manifest.shards)
    return manifest


def _check_names(remote: Remote, shards: Sequence[ShardInfo]) -> None:
    for shard in shards:
        if PurePosixPath(shard.name).name != shard.name:  # it becomes a path in the cache folder
            raise DataError(
                f"{remote.url}/{MANIFEST} names a shard {shard.name!r}, which is no file name: "
                "shards in several folders are read from a folder of this machine alone"
            )


def _fetch_columns(
    remote: Remote, shards: Sequence[ShardInfo], folder: Path | None
) -> list[Columns]:
    """Return the columns of every shard; with a cache `folder`, their files are kept in it."""
    if folder is None:
        indexes = _fetch_indexes(remote, shards, {})
    else:
        try:
            indexes = _cached_indexes(remote, shards, folder)
        except OSError as error:
            raise unusable(folder, error) from error
    pairs = zip(indexes, shards, strict=True)
    return [read_columns(index, shard, remote.url) for index, shard in pairs]


def _cached_indexes(remote: Remote, shards: Sequence[ShardInfo], folder: Path) -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "index.lock"):  # one process of a machine fetches, the others find
        for torn in folder.glob("*.idx.part*"):  # of one that was killed here
            torn.unlink()
        known = dict[str, bytes]()
        for shard in shards:
            with suppress(FileNotFoundError):
                index = (folder / index_name(shard)).read_bytes()
                if hashlib.sha256(index).hexdigest() == shard.index_sha256:
                    known[shard.name] = index
        indexes = _fetch_indexes(remote, shards, known)
        for shard, index in zip(shards, indexes, strict=True):
            if shard.name not in known:
                write_atomically(folder / index_name(shard), index)
    return indexes


def _fetch_indexes(
    remote: Remote, shards: Sequence[ShardInfo], known: dict[str, bytes]
) -> list[bytes]:
    """Return the index of every shard, from the URL unless it is `known`."""
    begun = {
        shard.name: remote.start(index_name(shard), sha256=shard.index_sha256)
        for shard in shards
        if shard.name not in known
    }
    return [known.get(shard.name) or finish(begun[shard.name]) for shard in shards]
