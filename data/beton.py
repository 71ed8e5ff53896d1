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
_TYPES = {1: ("integer", np.dtype("<i8")), 2: ("image", _IMAGE)}
_OTHER_TYPES = {0: "float", 3: "bytes", 4: "array", 5: "JSON", 6: "tensor", 255: "custom"}
_RECORD = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
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
        fields["type"], fields["name"] = (2, 1), (b"image", b"label")
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._records.tobytes())


def _read_records(file: IO[bytes], name: str) -> tuple[Iterator[Any], NDArray[np.uint64], int]:
    """Return the records as (image, label), the sizes of the images, and where the data ends."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    header = _take(file, name, _HEADER, 1)[0]
    if header["version"] != _VERSION:
        raise DataError(
            f"{name} is no .beton file of version {_VERSION} (it says {header['version']}); "
            "name another, or write it again"
        )
    fields = _take(file, name, _FIELD, int(header["num_fields"]))
    image, label, layout = _layout(fields, name)
    count, table = int(header["num_samples"]), int(header["table"])
    if count == 0 or not 0 < table <= length - count * _PLACE.itemsize:
        raise DataError(f"{name} is truncated or holds no samples; {_REWRITE}")
    records = _take(file, name, layout, count)
    file.seek(table)
    places = _take(file, name, _PLACE, (length - table) // _PLACE.itemsize)
    places = places[np.argsort(places["place"])]
    row = np.searchsorted(places["place"], records[image]["place"])
    found = places[np.minimum(row, len(places) - 1)]
    if (found["place"] != records[image]["place"]).any():
        raise DataError(f"{name} does not say how long its images are; {_REWRITE}")
    return zip(records[image], records[label], strict=True), found["size"], table


def _take(file: IO[bytes], name: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    content = file.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise DataError(f"{name} is truncated, or no .beton file; {_REWRITE}")
    return np.frombuffer(content, dtype, count)


def _layout(fields: NDArray[Any], name: str) -> tuple[str, str, np.dtype[Any]]:
    """Return the names, in a record, of the image and the label, and the record's layout."""
    kinds = [_TYPES[type][0] if type in _TYPES else "" for type in fields["type"].tolist()]
    if sorted(kinds) != ["image", "integer"]:
        names = {**{type: kind for type, (kind, _) in _TYPES.items()}, **_OTHER_TYPES}
        found = ", ".join(
            f"{field['name'].decode(errors='replace')!r} ({names.get(int(field['type']), '?')})"
            for field in fields
        )
        raise DataError(
            f"{name} has the fields {found}; just one image and one integer, its class, are read: "
            "write the file again with these"
        )
    layout = np.dtype([(kind, dict(_TYPES.values())[kind]) for kind in kinds], align=True)
    return "image", "integer", layout


def _scan_sample(
    file: IO[bytes], number: int, record: Any, size: int, end: int, headers_only: bool
) -> dict[str, int]:
    (mode, width, height, place), label = record[0].item(), int(record[1])
    if mode not in (_JPEG, _RAW) or place + size > end or not 0 < size < 1 << 32:
        raise DataError(f"(mode {mode}, {size} bytes at {place}) lies outside; {_REWRITE}")
    if not 0 <= label <= MAX_LABEL:
        raise DataError(f"has class {label}, not one of at most six digits; {_REWRITE}")
    content, crc32, flags = b"", 0, Flag.RAW | Flag.NOT_JPEG
    if not headers_only:
        content = _read(file, place, size)
        crc32 = zlib.crc32(content)
    if mode == _RAW:
        found = (width, height)
        if size != 3 * width * height:
            raise DataError(f"has {size} bytes for {width} × {height} pixels; {_REWRITE}")
    else:
        *found_size, flags = describe(content, whole=True) if content else _head(file, place, size)
        found = (found_size[0], found_size[1])
    if found != (width, height):
        raise DataError(f"has {found} pixels instead of {(width, height)}; {_REWRITE}")
    return {
        "offset": place,
        "key": hash_key(str(number)),
        "size": size,
        "label": label,
        "crc32": crc32,
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
