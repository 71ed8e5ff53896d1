"""The `.idx` file beside a shard: a header, then flat little-endian columns, one row a sample.

Owns that format, and what an image says of itself before it is decoded. Invariant: the header's
seal covers the columns and what they were made from, so that an index that was torn, altered, or
made from another shard or with other settings is told from a good one without a manifest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base import DataError
from data.decode import PNG_MAGIC, Damaged, open_image
from data.jpeg import check

INDEX_FORMAT = 3  # of the `.idx` files and of the manifest that lists them
_MAGIC = b"FOVEAIDX"
_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("format", "<u8"),
        ("num_samples", "<u8"),
        ("bytes", "<u8"),
        ("seal", "V32"),
    ]
)
_COLUMNS = (
    ("offset", "<u8"),
    ("key", "<u8"),
    ("size", "<u4"),
    ("label", "<i4"),
    ("crc32", "<u4"),
    ("width", "<u2"),
    ("height", "<u2"),
    ("flags", "u1"),
)
Columns = dict[str, NDArray[Any]]  # the columns above, each of shape [num_samples]
MAX_LABEL = 999_999  # the manifest names every class up to the highest
_ORIENTATION = 0x0112  # the EXIF tag


class Flag(IntFlag):
    """What the index says of a sample, u8.

    RAW ones are pixels uint8 [height, width, 3], of NO_CRC ones nobody has looked at all the bytes.
    ROTATED means an EXIF orientation that asks viewers to turn the image, which decoding ignores.
    CORRUPT ones were cut off or damaged before they were indexed; where not even the size could be
    read, it is 0 × 0.
    """

    PROGRESSIVE = 1
    CMYK = 2
    GREY = 4
    ROTATED = 8
    NOT_JPEG = 16
    RAW = 32
    NO_CRC = 64
    CORRUPT = 128


class Torn(DataError):
    """The image's header is not whole in the bytes at hand; with more of them it may be."""


def describe(content: bytes, *, whole: bool) -> tuple[int, int, Flag]:
    """Return an image's width, height and flags, from all of its bytes or its beginning.

    All bytes are read to the end of the image. Raises DataError if it is no JPEG or PNG file or too
    large, Torn if the beginning ends too early to tell.
    """
    try:
        picture = open_image(content)
    except Damaged as error:
        if not whole:
            raise Torn(str(error)) from error
        return 0, 0, Flag.CORRUPT | (Flag.NOT_JPEG if content.startswith(PNG_MAGIC) else Flag(0))
    flags = Flag.CORRUPT if whole and _is_damaged(content) else Flag(0)
    if picture.format != "JPEG":
        flags |= Flag.NOT_JPEG
    if "progressive" in picture.info:
        flags |= Flag.PROGRESSIVE
    if picture.mode == "CMYK":
        flags |= Flag.CMYK
    if picture.mode in ("1", "L", "LA", "I", "I;16"):
        flags |= Flag.GREY
    # What cameras write there is often broken; it is not worth losing the image.
    with suppress(SyntaxError, ValueError, LookupError, OSError, TypeError, struct.error):
        if "exif" in picture.info and picture.getexif().get(_ORIENTATION, 1) != 1:
            flags |= Flag.ROTATED
    return *picture.size, flags


def _is_damaged(content: bytes) -> bool:
    try:
        check(content)
    except Damaged:
        return True
    return False


def to_columns(rows: Sequence[dict[str, int]]) -> Columns:
    """Return the index columns of samples that each name all of them."""
    return {name: np.array([row[name] for row in rows], dtype) for name, dtype in _COLUMNS}


def hash_key(key: str) -> int:
    """Return the 64-bit hash of a sample's name."""
    name = key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "little")


def pack_index(columns: Columns, *, num_bytes: int, made_from: str) -> bytes:
    """Return the content of the `.idx` of a shard of `num_bytes`.

    `made_from` says what the columns are a function of: the shard's hash, and how it was scanned.
    """
    body = b"".join(columns[name].tobytes() for name, _ in _COLUMNS)
    header = np.zeros((), _HEADER)
    header["magic"], header["format"], header["bytes"] = _MAGIC, INDEX_FORMAT, num_bytes
    header["num_samples"] = len(columns["label"])
    header["seal"] = np.void(_seal(body, made_from))
    return header.tobytes() + body


def parse_index(content: bytes) -> Columns | None:
    """Return the columns in the bytes of an `.idx` file, or None if they are not one."""
    header = _parse_header(content)
    if header is None:
        return None
    columns: Columns = {}
    num_samples, start = int(header["num_samples"]), _HEADER.itemsize
    for name, dtype in _COLUMNS:
        columns[name] = np.frombuffer(content, dtype, num_samples, start)
        start += columns[name].nbytes
    return columns


def is_made_from(content: bytes, made_from: str, *, num_bytes: int) -> bool:
    """Whether the bytes of an `.idx` file are whole and were made from this."""
    header = _parse_header(content)
    if header is None or int(header["bytes"]) != num_bytes:
        return False
    return bytes(header["seal"].tobytes()) == _seal(content[_HEADER.itemsize :], made_from)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, and rename into place."""
    beside = path.with_name(f"{path.name}.part{os.getpid()}")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextmanager
def room_for(place: Path) -> Iterator[None]:
    """Raise DataError where the disk of `place` is full, or a quota used up."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"there is no space left for {place} ({error.strerror}); free some and run this again"
        ) from error


def _parse_header(content: bytes) -> Any:
    """Return the header of an index of this format and of the length that it says, else None."""
    if len(content) < _HEADER.itemsize:
        return None
    header = np.frombuffer(content, _HEADER, count=1)[0]
    if header["magic"] != _MAGIC or header["format"] != INDEX_FORMAT:
        return None
    row = sum(np.dtype(dtype).itemsize for _, dtype in _COLUMNS)
    whole = _HEADER.itemsize + int(header["num_samples"]) * row
    return header if len(content) == whole else None


def _seal(body: bytes, made_from: str) -> bytes:
    return hashlib.sha256(made_from.encode() + b"\0" + body).digest()
