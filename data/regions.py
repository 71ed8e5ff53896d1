"""Regions beside a shard: NAME.roi, with which parts of its JPEG files are decoded alone.

Owns the file's format: a 48-byte header, little-endian; where each sample's entry begins and, one
more, where the last ends, u64; then the entries, a CRC and what `jpeg.build_regions` returned, or
nothing. Invariant: the file only ever saves time. It belongs to one index, each entry to one
sample's bytes, and whatever does not fit, is damaged or missing is as if there were none.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.jpeg import build_regions

_HEADER = struct.Struct("<8sII32s")  # magic, format, number of samples, SHA-256 of the index
_MAGIC = b"FOVEAROI"
_FORMAT = 1
_CHUNK = 256  # images in memory at a time


def scan_regions(
    path: Path,
    offsets: NDArray[np.uint64],
    sizes: NDArray[np.uint32],
    *,
    index_sha256: str,
    threads: int,
) -> bytes | None:
    """Return the content of NAME.roi for the images at `offsets` of the shard `path`.

    Those of size 0 are left out; None where no image can be indexed.
    """
    entries: list[bytes] = []
    with path.open("rb") as shard, ThreadPoolExecutor(threads) as pool:
        for images in _chunks(shard.fileno(), offsets, sizes):
            entries += pool.map(_entry, images)
    if not any(entries):
        return None
    header = _HEADER.pack(_MAGIC, _FORMAT, len(entries), bytes.fromhex(index_sha256))
    first = _HEADER.size + 8 * (len(entries) + 1)
    ends = np.cumsum([first, *map(len, entries)], dtype="<u8")
    return b"".join([header, ends.tobytes(), *entries])


def belongs(path: Path, *, num_samples: int, index_sha256: str) -> bool:
    """Whether the file at `path` is there, and the regions of the shard with this index."""
    expected = _HEADER.pack(_MAGIC, _FORMAT, num_samples, bytes.fromhex(index_sha256))
    try:
        with path.open("rb") as file:
            return file.read(_HEADER.size) == expected
    except FileNotFoundError:
        return False


class Regions:
    """The open regions of a shard; any thread may read them."""

    def __init__(self, path: Path, *, num_samples: int, index_sha256: str) -> None:
        expected = _HEADER.pack(_MAGIC, _FORMAT, num_samples, bytes.fromhex(index_sha256))
        self._file: int | None = None
        try:
            self._file = os.open(path.with_suffix(".roi"), os.O_RDONLY)
        except OSError:
            return
        if os.pread(self._file, _HEADER.size, 0) != expected:
            self.close()

    def close(self) -> None:
        """Close the file; from then on there are no regions."""
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def read(self, row: int, crc32: int) -> bytes | None:
        """Return the regions of the shard's sample `row`, whose bytes have this CRC, if any."""
        if self._file is None:
            return None
        bounds = os.pread(self._file, 16, _HEADER.size + 8 * row)
        if len(bounds) < 16:
            return None
        start, end = struct.unpack("<QQ", bounds)
        if not 4 < end - start < 1 << 24:
            return None
        entry = os.pread(self._file, end - start, start)
        return entry[4:] if _crc(entry[4:], crc32) == entry[:4] else None


def _chunks(
    file: int, offsets: NDArray[np.uint64], sizes: NDArray[np.uint32]
) -> Iterator[list[bytes]]:
    places = list(zip(offsets.tolist(), sizes.tolist(), strict=True))
    for start in range(0, len(places), _CHUNK):
        yield [os.pread(file, size, offset) for offset, size in places[start : start + _CHUNK]]


def _entry(image: bytes) -> bytes:
    regions = build_regions(image)
    return b"" if regions is None else _crc(regions, zlib.crc32(image)) + regions


def _crc(regions: bytes, image_crc32: int) -> bytes:
    """The CRC of the regions, which continues that of the image: it vouches for both."""
    return zlib.crc32(regions, image_crc32).to_bytes(4, "little")
