"""FFCV's .beton files, read and written with numpy alone: an image and a label per sample.

Owns the layout (version 2 of Leclerc et al., arXiv:2306.12517), all little-endian: a header; a
descriptor per field; a record per sample, in which an image is its mode, width, height and place,
and an integer is itself; from the next page on the images, none of which crosses from one page
into another; at the end a table of what lies where. Invariant: what is written is a function of
the samples alone, and FFCV reads it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data.base import DataError
from data.columns import MAX_LABEL, Columns, Flag, Torn, describe, hash_key, to_columns

_VERSION = 2
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table", "<u8"),
    ]
)
_FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
_PLACE = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
_LABEL_TYPE, _IMAGE_TYPE = 1, 2
_TYPES = {_LABEL_TYPE: ("label", "<i8"), _IMAGE_TYPE: ("image", _IMAGE)}
_NAMES = ("float", "integer", "image", "bytes", "array", "JSON", "tensor", "other")  # of types
_RECORD = np.dtype([_TYPES[_IMAGE_TYPE], _TYPES[_LABEL_TYPE]], align=True)
_JPEG, _RAW = 0, 1  # FFCV's modes of an image
_PAGE = 1 << 23  # bytes: FFCV's default; more where an image is larger
_MAX_PAGE = 1 << 31
_HEAD = 1 << 16  # bytes of an image that are read for its header
_REWRITE = "write the file again"


def scan_beton(file: IO[bytes], name: str, *, headers_only: bool = False) -> Columns:
    """Return the index columns of the .beton in a seekable `file`, in the order of its samples.

    With `headers_only` of each JPEG just the beginning is read, so that there is no CRC. Raises
    DataError naming the file, and the sample at fault.
    """
    records, sizes, end = _read_records(file, name)
    rows = []
    for number, (record, size) in enumerate(zip(records, sizes.tolist(), strict=True)):
        try:
            rows.append(_scan_sample(file, number, record, size, end, headers_only))
        except DataError as error:
            raise DataError(f"{name}: sample {number} {error}") from error
    return to_columns(rows)


def field_names(file: IO[bytes], name: str) -> tuple[str, str]:
    """Return the names of the image and of the label in the .beton `file`.

    Raises DataError if it has other fields, or is no such file.
    """
    _, fields, _ = _parse_header(file, name)
    names = {
        type: text.decode(errors="replace") for type, text in fields[["type", "name"]].tolist()
    }
    return names[_IMAGE_TYPE], names[_LABEL_TYPE]


class BetonWriter:
    """Writes samples one after the other, given how many there will be and their largest size."""

    def __init__(self, file: IO[bytes], *, num_samples: int, largest: int) -> None:
        if largest > _MAX_PAGE:
            raise DataError(f"an image of {largest} bytes is more than a .beton can hold")
        self._file = file
        self._page = max(_PAGE, 1 << (largest - 1).bit_length())
        self._records = np.zeros(num_samples, _RECORD)
        self._places = np.zeros(num_samples, _PLACE)
        self._count = 0
        first = _HEADER.itemsize + 2 * _FIELD.itemsize + self._records.nbytes
        self._end = -(-first // self._page) * self._page
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def add(self, content: bytes, *, label: int, size: tuple[int, int], raw: bool) -> None:
        """Append a sample: the bytes of a JPEG file, or `raw` RGB pixels, of width and height."""
        left = -self._end % self._page
        if len(content) > left:
            self._file.write(bytes(left))
            self._end += left
        self._file.write(content)
        mode = _RAW if raw else _JPEG
        self._records[self._count] = ((mode, *size, self._end), label)
        self._places[self._count] = (self._count, self._end, len(content))
        self._end += len(content)
        self._count += 1

    def close(self) -> None:
        """Write the table, then header, fields and records; the file stays open."""
        assert self._count == len(self._records), "as many samples as were announced"
        self._file.write(bytes(-self._end % self._page))
        table = self._file.tell()
        self._file.write(self._places.tobytes())
        header = np.array((_VERSION, 2, self._page, self._count, table), _HEADER)
        fields = np.zeros(2, _FIELD)
        fields["type"], fields["name"] = (_IMAGE_TYPE, _LABEL_TYPE), (b"image", b"label")
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._records.tobytes())


def _parse_header(file: IO[bytes], name: str) -> tuple[NDArray[Any], NDArray[Any], np.dtype[Any]]:
    """Return the header, the fields, and the layout of the records, which follow in the file."""
    file.seek(0)
    header = _take(file, name, _HEADER, 1)
    version = int(header["version"][0])
    if version != _VERSION:
        raise DataError(
            f"{name} is no .beton file of version {_VERSION} (it says {version}); name another, "
            "or write it again"
        )
    fields = _take(file, name, _FIELD, int(header["num_fields"][0]))
    types = fields["type"].tolist()
    if sorted(types) != sorted(_TYPES):
        found = ", ".join(
            f"{text.decode(errors='replace')} ({_NAMES[min(type, len(_NAMES) - 1)]})"
            for type, text in fields[["type", "name"]].tolist()
        )
        raise DataError(
            f"{name} has the fields {found}; just one image and one integer, its class, are read: "
            "write the file again with these"
        )
    return header[0], fields, np.dtype([_TYPES[type] for type in types], align=True)


def _read_records(file: IO[bytes], name: str) -> tuple[Iterator[Any], NDArray[np.uint64], int]:
    """Return the records as (image, label), the sizes of the images, and where the data ends."""
    header, _, layout = _parse_header(file, name)
    count, table, first = int(header["num_samples"]), int(header["table"]), file.tell()
    length = file.seek(0, os.SEEK_END)
    if count == 0 or not first + count * layout.itemsize <= table <= length - _PLACE.itemsize:
        raise DataError(f"{name} is truncated or holds no samples; {_REWRITE}")
    file.seek(first)
    records = _take(file, name, layout, count)
    file.seek(table)
    places = _take(file, name, _PLACE, (length - table) // _PLACE.itemsize)
    places = places[np.argsort(places["place"])]
    wanted = records["image"]["place"]
    row = np.searchsorted(places["place"], wanted)
    found = places[np.minimum(row, len(places) - 1)]
    if (found["place"] != wanted).any():
        raise DataError(f"{name} does not say how long its images are; {_REWRITE}")
    return zip(records["image"], records["label"], strict=True), found["size"], table


def _take(file: IO[bytes], name: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    content = file.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise DataError(f"{name} is truncated, or no .beton file; {_REWRITE}")
    return np.frombuffer(content, dtype, count)


def _scan_sample(
    file: IO[bytes], number: int, record: Any, size: int, end: int, headers_only: bool
) -> dict[str, int]:
    (mode, width, height, place), label = record[0].item(), int(record[1])
    if mode not in (_JPEG, _RAW) or place + size > end or not 0 < size < 1 << 32:
        raise DataError(f"(mode {mode}, {size} bytes at {place}) lies outside; {_REWRITE}")
    if not 0 <= label <= MAX_LABEL:
        raise DataError(f"has class {label}, not one of at most six digits; {_REWRITE}")
    content = b"" if headers_only else _read(file, place, size)
    if mode == _RAW:
        found, flags = [width, height], Flag.RAW | Flag.NOT_JPEG
        if size != 3 * width * height:
            raise DataError(f"has {size} bytes for {width} × {height} pixels; {_REWRITE}")
    else:
        *found, flags = describe(content, whole=True) if content else _head(file, place, size)
    if found != [width, height]:
        raise DataError(
            f"has {' × '.join(map(str, found))} pixels instead of {width} × {height}; {_REWRITE}"
        )
    return {
        "offset": place,
        "key": hash_key(str(number)),
        "size": size,
        "label": label,
        "crc32": zlib.crc32(content),
        "width": width,
        "height": height,
        "flags": flags | Flag.NO_CRC if headers_only else flags,
    }


def _head(file: IO[bytes], place: int, size: int) -> tuple[int, int, Flag]:
    if size > _HEAD:
        try:
            return describe(_read(file, place, _HEAD), whole=False)
        except Torn:
            pass
    return describe(_read(file, place, size), whole=True)


def _read(file: IO[bytes], place: int, size: int) -> bytes:
    file.seek(place)
    content = file.read(size)
    if len(content) < size:
        raise DataError(f"is cut off; {_REWRITE}")
    return content
