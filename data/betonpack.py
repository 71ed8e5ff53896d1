"""Packing into a .beton: parts that processes write side by side, then one file joined from them.

Owns how an image is stored, and the parts, which are images end to end, a table of them, and their
number. The parts stay until the file is whole, so that for a time twice its room is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data.base import BadSample, DataError, Sample, Source
from data.beton import BetonWriter
from data.columns import Flag, describe
from data.decode import decode_whole
from data.webdataset import read_stored

IMAGE_MODES = ("jpg", "raw", "mixed")
# Bytes of pixels up to which `mixed` stores them: Linux reads that much ahead at once, so that they
# cost no more requests than a JPEG file, and no decoding.
RAW_BYTES = 128 << 10
_ROW = np.dtype(
    [("size", "<u8"), ("label", "<i8"), ("width", "<u2"), ("height", "<u2"), ("raw", "?")]
)
_COUNT_BYTES = 8


def write_part(file: IO[bytes], source: Source, ids: NDArray[np.int64], image_mode: str) -> None:
    """Write the samples `ids` int64 [n]; raises DataError naming one that cannot be read."""
    table = np.zeros(len(ids), _ROW)
    for row, id in enumerate(ids.tolist()):
        sample = read_stored(source, id)
        try:
            content, (width, height), raw = _encode(sample, image_mode)
        except DataError as error:
            raise BadSample(f"{source.name(id)} {error}") from error
        file.write(content)
        table[row] = (len(content), sample.label, width, height, raw)
    file.write(table.tobytes() + len(ids).to_bytes(_COUNT_BYTES, "little"))


def join_parts(parts: Sequence[Path], target: Path) -> None:
    """Write the .beton of all `parts`, in order, beside `target`, and rename it into place."""
    tables = [_read_table(part) for part in parts]
    rows = np.concatenate(tables)
    beside = target.with_name(f"{target.name}.part{os.getpid()}")
    with beside.open("wb") as file:
        writer = BetonWriter(file, num_samples=len(rows), largest=int(rows["size"].max()))
        for part, table in zip(parts, tables, strict=True):
            _append(writer, part, table)
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    beside.rename(target)


def _encode(sample: Sample, image_mode: str) -> tuple[bytes, tuple[int, int], bool]:
    """Return what is stored of an image: bytes, width and height, and whether they are pixels.

    JPEG files stay as they are, damaged ones too, but those of four colours, which FFCV's decoder
    does not know. Raises DataError for damaged ones of which pixels are needed.
    """
    image = sample.image
    if isinstance(image, bytes):
        width, height, flags = describe(image, whole=True)
        is_jpeg = not flags & (Flag.NOT_JPEG | Flag.CMYK)
        is_damaged = bool(flags & Flag.CORRUPT)
        few = 3 * width * height <= RAW_BYTES and not is_damaged
        if is_jpeg and (image_mode == "jpg" or (image_mode == "mixed" and not few)):
            return image, (width, height), False
        if is_damaged:
            raise DataError("is damaged: there are no pixels to store; replace the file")
    pixels = decode_whole(image)
    return pixels.tobytes(), (pixels.shape[1], pixels.shape[0]), True


def _read_table(part: Path) -> NDArray[Any]:
    with part.open("rb") as file:
        file.seek(-_COUNT_BYTES, os.SEEK_END)
        count = int.from_bytes(file.read(), "little")
        file.seek(-_COUNT_BYTES - count * _ROW.itemsize, os.SEEK_END)
        return np.frombuffer(file.read(count * _ROW.itemsize), _ROW)


def _append(writer: BetonWriter, part: Path, table: NDArray[Any]) -> None:
    with part.open("rb") as file:
        for size, label, width, height, raw in table.tolist():
            writer.add(file.read(size), label=label, size=(width, height), raw=raw)
