"""Random access to samples in indexed shards: tars in the WebDataset layout, and .beton files.

Owns the open files of the shards. Invariant: sample ids number the samples shard after shard in
the manifest's order, and a sample whose bytes do not match their CRC, where the index has one, is
never returned.
Files are read, not memory-mapped: a map keeps a descriptor for ever, lets nobody else run while a
page comes in, and kills the process when a file shrinks.
"""

from __future__ import annotations

import os
import resource
import weakref
import zlib
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.base import BadSample, DataError, Sample
from data.columns import Columns, Flag
from data.index import Manifest, ShardInfo, check_shard
from data.regions import Regions
from data.tar import member_name


class TarSource:
    """The `Source` over a folder of tar or .beton shards with their manifest.

    Opening checks the size of every shard and the hash of every index; reading checks the
    sample's CRC. Shards are opened when first read, and kept open as far as the process's limit
    of open files allows. Raises DataError naming the shard and the remedy.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        manifest = Manifest.load(self._folder)
        self._shards = manifest.shards
        self._columns: list[Columns] = [check_shard(self._folder, s) for s in manifest.shards]
        self._open = lru_cache(maxsize=_max_open_shards())(partial(_ShardFile, self._folder))
        self.shard_sizes = manifest.shard_sizes
        self._ends = np.cumsum([shard.num_samples for shard in manifest.shards])
        self.fingerprint = manifest.fingerprint
        self.classes = manifest.classes
        self.labels: NDArray[np.int64] = np.concatenate(
            [columns["label"] for columns in self._columns]
        ).astype(np.int64)

    def __reduce__(self) -> tuple[type[TarSource], tuple[Path]]:
        """Open it again where it is sent: open files cannot be."""
        return TarSource, (self._folder,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """Nothing needs to be fetched."""

    def prefetch(self, ids: Sequence[int]) -> None:
        """Nothing needs to be fetched."""

    def read(self, id: int) -> Sample:
        """Return sample `id`; raises BadSample naming shard and member if its bytes changed."""
        shard, row = self._locate(id)
        columns, crc32 = self._columns[shard], int(self._columns[shard]["crc32"][row])
        offset = int(columns["offset"][row])
        image = self._read(shard, offset, int(columns["size"][row]))
        label, flags = int(columns["label"][row]), Flag(int(columns["flags"][row]))
        if Flag.NO_CRC not in flags and zlib.crc32(image) != crc32:
            raise BadSample(
                f"{self.name(id)} has changed since it was indexed; restore the shard, or run "
                f"`foveate data index {self._folder}`"
            )
        if Flag.RAW in flags:
            shape = (int(columns["height"][row]), int(columns["width"][row]), 3)
            return Sample(id=id, image=np.frombuffer(image, np.uint8).reshape(shape), label=label)
        regions = self._open(self._shards[shard]).read_regions(row, crc32)
        return Sample(id=id, image=image, label=label, regions=regions)

    def name(self, id: int) -> str:
        """Return `SHARD:MEMBER (sample id)`, where the member of a .beton is its number in it."""
        shard, row = self._locate(id)
        offset, member = int(self._columns[shard]["offset"][row]), str(row)
        if self._shards[shard].name.endswith(".tar"):
            member = member_name(self._read(shard, offset - 512, 512))
        return f"{self._folder / self._shards[shard].name}:{member} (sample {id})"

    def _read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        info = self._shards[shard]
        try:
            return self._open(info).read(offset, num_bytes)
        except OSError as error:
            raise DataError(
                f"{self._folder / info.name} cannot be read ({error}); restore it"
            ) from error

    def _locate(self, id: int) -> tuple[int, int]:
        """Return the shard's index and the row in it."""
        shard = int(np.searchsorted(self._ends, id, side="right"))
        return shard, id - int(self._ends[shard] - self._shards[shard].num_samples)


class _ShardFile:
    """A shard and its regions, which any thread may read, closed once nobody refers to them."""

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        path = folder / info.name
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._regions = Regions(path, num_samples=info.num_samples, index_sha256=info.index_sha256)
        weakref.finalize(self, self._regions.close)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return `num_bytes` from `offset` on, fewer at the end of the file."""
        return os.pread(self._descriptor, num_bytes, offset)

    def read_regions(self, row: int, crc32: int) -> bytes | None:
        """Return the regions of a sample whose bytes have this CRC, if it has any."""
        return self._regions.read(row, crc32)


def _max_open_shards() -> int | None:
    """An eighth of the open files that the process may have.

    A shard takes two, so that two sources leave half to others.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else max(1, limit // 8)
