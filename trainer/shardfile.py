"""Shard files: what one process wrote of a checkpoint, in the safetensors format.

Every tensor in a file is a box of a larger one, and where it lies in the whole is said in the
header's metadata: any number of files, cut in any way, makes up a checkpoint. Torch-free.
Format: https://huggingface.co/docs/safetensors/index
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import UserError
from .manifest import FileRecord, write_durably

_PLACES = "places"  # the metadata's key for every tensor's [whole shape, offsets], as JSON


@dataclass(frozen=True)
class Box:
    """A part of a tensor: by dimension, `sizes` elements from `offsets` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box that is all of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        """How many numbers are in it."""
        return math.prod(self.sizes)

    def share(self, index: int, count: int) -> Box | None:
        """Return part `index` of `count` along the first dimension; None where it is empty.

        A single number is not divided: the last part has it.
        """
        rows = self.sizes[0] if self.sizes else 1
        first, end = rows * index // count, rows * (index + 1) // count
        if first == end or not self.sizes:
            return self if end > first else None
        return Box((self.offsets[0] + first, *self.offsets[1:]), (end - first, *self.sizes[1:]))

    def overlap(self, other: Box) -> Box | None:
        """Return what two boxes of one tensor have in common; None if that is nothing."""
        low = tuple(map(max, self.offsets, other.offsets))
        ends = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        high = (min(a + n, b + m) for a, n, b, m in ends)
        sizes = tuple(end - begin for begin, end in zip(low, high, strict=True))
        return Box(low, sizes) if all(size > 0 for size in sizes) else None

    def within(self, other: Box) -> tuple[slice, ...]:
        """Return where this box lies in an array that holds the `other` one around it."""
        places = zip(self.offsets, self.sizes, other.offsets, strict=True)
        return tuple(slice(low - base, low - base + size) for low, size, base in places)


@dataclass(frozen=True)
class Piece:
    """A box of a named tensor of the whole `shape`; `dtype` as safetensors spells it: F32, I64."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box


def write(path: Path, pieces: Sequence[tuple[Piece, memoryview]]) -> FileRecord:
    """Write pieces, one at most of each tensor, with their bytes; it then is on the disk."""
    # Wide types first, as safetensors has it, so that every number is aligned.
    pieces = sorted(pieces, key=lambda item: item[0].box.num_elements / max(item[1].nbytes, 1))
    places = {piece.name: [piece.shape, piece.box.offsets] for piece, _ in pieces}
    header: dict[str, object] = {"__metadata__": {_PLACES: json.dumps(places)}}
    end = 0
    for piece, data in pieces:
        begin, end = end, end + data.nbytes
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": piece.box.sizes,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_durably(path, [len(text).to_bytes(8, "little"), text, *(d for _, d in pieces)])


class ShardFile:
    """A shard file opened to be read: its header, and its data mapped into memory.

    Only what is looked at of the data is read. `pieces` has every piece by its tensor's name.

    Raises:
        UserError: if it is a safetensors file without places, as Foveate wrote before.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            # A private mapping is writable without a write ever reaching the file: torch and
            # numpy take it without complaint.
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._map = memoryview(self._file)
        metadata = header.pop("__metadata__", {})
        if _PLACES not in metadata:
            raise UserError(
                f"{path.parent} is a checkpoint in the format of an earlier version of Foveate: "
                "go on with the code of the run that wrote it, RUN/code"
            )
        places = json.loads(metadata[_PLACES])
        self.pieces: dict[str, Piece] = {}
        self._ranges: dict[str, slice] = {}
        for name, values in header.items():
            shape, offsets = map(tuple, places[name])
            self.pieces[name] = Piece(
                name, values["dtype"], shape, Box(offsets, tuple(values["shape"]))
            )
            begin, end = values["data_offsets"]
            self._ranges[name] = slice(8 + length + begin, 8 + length + end)

    def data(self, name: str) -> memoryview:
        """Return the bytes of a piece."""
        return self._map[self._ranges[name]]

    def forget(self, name: str) -> None:
        """Give back the memory that a piece was read into; looking again reads it again."""
        place = self._ranges[name]
        begin = place.start // mmap.PAGESIZE * mmap.PAGESIZE
        if place.stop > begin:
            self._file.madvise(mmap.MADV_DONTNEED, begin, place.stop - begin)
