"""The index of a set of tar shards: where every sample lies, and proof that nothing changed.

Beside each shard `NAME.tar` stands `NAME.idx`: a 32-byte header, then flat little-endian columns,
32 bytes per sample; and `NAME.roi` (regions.py) if its images are JPEG files. `manifest.json`
lists the shards in canonical order with their sizes and hashes; its own hash is the fingerprint of
the data set. Sizes and index hashes are checked when a set is opened, shard hashes by `verify`,
each sample's CRC when it is read. Invariant: every file is written beside and renamed into place,
the manifest last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base import DataError
from data.decode import open_image
from data.regions import scan_regions

MANIFEST = "manifest.json"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
_FORMAT = 1
_REWRITE = "copy or pack the shard again"
_MAGIC = b"FOVEAIDX"
_HEADER = np.dtype([("magic", "S8"), ("format", "<u8"), ("num_samples", "<u8"), ("bytes", "<u8")])
_COLUMNS = (
    ("offset", "<u8"),
    ("key", "<u8"),
    ("size", "<u4"),
    ("label", "<i4"),
    ("crc32", "<u4"),
    ("width", "<u2"),
    ("height", "<u2"),
)
Columns = dict[str, NDArray[Any]]  # the columns above, each of shape [num_samples]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest says of one shard.

    `class_entropy` is the entropy of its labels in bits: close to the whole set's where the set
    was shuffled when written, 0 where a shard holds one class.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    class_entropy: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`: shards in canonical order, and class names by label."""

    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON form, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the canonical JSON text."""
        return json.dumps({"format": _FORMAT, "total": self.num_samples, **asdict(self)}, indent=1)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json; raises DataError if it is missing or not one."""
        path = folder / MANIFEST
        try:
            return cls.parse(path.read_bytes(), str(folder))
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing; {_rebuild(folder)}") from error
        except OSError as error:
            raise DataError(f"{path} is unreadable ({error!r}); {_rebuild(folder)}") from error

    @classmethod
    def parse(cls, content: bytes, folder: str) -> Manifest:
        """Read the manifest of `folder`, a path or a URL; raises DataError if it is not one."""
        path = f"{folder}/{MANIFEST}"
        try:
            fields = json.loads(content)
            if fields["format"] != _FORMAT:
                raise DataError(
                    f"{path}: format {fields['format']} is not {_FORMAT}; {_rebuild(folder)}"
                )
            shards = tuple(ShardInfo(**shard) for shard in fields["shards"])
            return cls(shards=shards, classes=tuple(fields["classes"]))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is unreadable ({error!r}); {_rebuild(folder)}") from error


def build(
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
) -> Manifest:
    """Index every `*.tar` of `folder` and write the manifest.

    Each sample is two members of one name, an image (.jpg, .jpeg, .png) and its label (.cls, a
    decimal number). Class names default to the numbers. Raises DataError naming the shard that
    is truncated, or lacks a label, an image or a class.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no *.tar shards; pack some, or name another folder")
    shards, num_classes = [], 0
    for path in paths:
        columns = scan(path)
        num_classes = max(num_classes, int(columns["label"].max(initial=-1)) + 1)
        shards.append(write_index(path, columns))
        _write_regions(path, columns, shards[-1].index_sha256)
        progress(f"indexed {path} ({shards[-1].num_samples} samples)")
    names = tuple(classes) if classes is not None else tuple(map(str, range(num_classes)))
    if len(names) < num_classes:
        raise DataError(
            f"{folder}: label {num_classes - 1} has no name among the {len(names)} classes given"
        )
    manifest = Manifest(shards=tuple(shards), classes=names)
    write_atomically(folder / MANIFEST, manifest.to_json().encode())
    progress(f"wrote {folder / MANIFEST}")
    return manifest


def verify(folder: Path, *, progress: Callable[[str], None] = print) -> Manifest:
    """Hash every shard; raises one DataError that lists all that differ from the manifest."""
    manifest = Manifest.load(folder)
    problems = []
    for shard in manifest.shards:
        try:
            check_shard(folder, shard)
            if hash_file(folder / shard.name) != shard.sha256:
                raise DataError(f"{folder / shard.name} was altered; {_restore(folder)}")
            progress(f"ok {folder / shard.name}")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    return manifest


def check_shard(folder: Path, shard: ShardInfo) -> Columns:
    """Check a shard's size and its index's hash, and return the index's columns.

    Raises DataError naming the shard and the remedy.
    """
    path = folder / shard.name
    if not path.is_file():
        raise DataError(f"{path} is missing (was it renamed?); {_restore(folder)}")
    found = path.stat().st_size
    if found != shard.num_bytes:
        fault = "truncated" if found < shard.num_bytes else "altered"
        raise DataError(
            f"{path} is {fault}: {found} bytes instead of {shard.num_bytes}; {_restore(folder)}"
        )
    index = folder / index_name(shard)
    if not index.is_file():
        raise DataError(f"{index} is missing; {_rebuild(folder)}")
    return read_columns(index.read_bytes(), shard, str(folder))


def read_columns(content: bytes, shard: ShardInfo, folder: str) -> Columns:
    """Return the columns in the index of a shard of `folder`, a path or a URL.

    Raises DataError if it is not the one that the manifest means.
    """
    index = f"{folder}/{index_name(shard)}"
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise DataError(f"{index} does not belong to the manifest; {_rebuild(folder)}")
    header = np.frombuffer(content, _HEADER, count=1)[0] if len(content) >= 32 else None
    if header is None or header["magic"] != _MAGIC or header["format"] != _FORMAT:
        raise DataError(f"{index} is not an index of format {_FORMAT}; {_rebuild(folder)}")
    num_samples, start = int(header["num_samples"]), _HEADER.itemsize
    columns: Columns = {}
    for name, dtype in _COLUMNS:
        columns[name] = np.frombuffer(content, dtype, num_samples, start)
        start += columns[name].nbytes
    return columns


def index_name(shard: ShardInfo) -> str:
    """Return the name of the index beside a shard."""
    return PurePosixPath(shard.name).with_suffix(".idx").name


def scan(path: Path) -> Columns:
    """Read a tar from end to end and return its index columns, in the order of the images.

    Reads what GNU tar, PAX archivers and webdataset's writer produce, uncompressed; hidden files
    are left out. Raises DataError naming the tar and the member at fault.
    """
    rows: dict[str, tuple[int, ...]] = {}
    labels: dict[str, int] = {}
    dotted: set[str] = set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or PurePosixPath(member.name).name.startswith("."):
                    continue
                key, _, suffix = _split_name(member.name)
                if suffix == "cls":
                    _put_once(labels, key, _parse_label(path, archive, member), path, member)
                elif suffix in IMAGE_SUFFIXES:
                    _put_once(rows, key, _scan_image(path, archive, member), path, member)
                elif suffix.rpartition(".")[2] in ("cls", *IMAGE_SUFFIXES):
                    dotted.add(key)  # a further picture of the sample, or a name with a dot
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}); {_REWRITE}") from error
    _check_end(path)
    unpaired = sorted((rows.keys() ^ labels.keys()) | (dotted - rows.keys()))
    if unpaired:
        raise DataError(
            f"{path}: {unpaired[0]!r} lacks its image or its .cls label (a sample's name ends at "
            f"the first dot); {_REWRITE}"
        )
    if not rows:
        raise DataError(f"{path}: no samples; {_REWRITE}")
    table = [(*row, labels[key]) for key, row in rows.items()]
    fields = ("key", "offset", "size", "crc32", "width", "height", "label")
    values = dict(zip(fields, zip(*table, strict=True), strict=True))
    return {name: np.array(values[name], dtype) for name, dtype in _COLUMNS}


def write_index(path: Path, columns: Columns) -> ShardInfo:
    """Write the `.idx` of the tar at `path`, and return what the manifest says of the shard."""
    labels = columns["label"]
    header = np.array((_MAGIC, _FORMAT, len(labels), path.stat().st_size), _HEADER)
    index = header.tobytes() + b"".join(columns[name].tobytes() for name, _ in _COLUMNS)
    write_atomically(path.with_suffix(".idx"), index)
    return ShardInfo(
        name=path.name,
        num_samples=len(labels),
        num_bytes=path.stat().st_size,
        sha256=hash_file(path),
        index_sha256=hashlib.sha256(index).hexdigest(),
        class_entropy=round(_entropy_bits(labels), 4),
    )


def _write_regions(path: Path, columns: Columns, index_sha256: str) -> None:
    target = path.with_suffix(".roi")
    regions = scan_regions(path, columns["offset"], columns["size"], index_sha256=index_sha256)
    if regions is None:
        target.unlink(missing_ok=True)  # an earlier shard's
    else:
        write_atomically(target, regions)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, and rename into place."""
    beside = path.with_name(f"{path.name}.part{os.getpid()}")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def member_name(block: bytes) -> str:
    """Return the name in the 512-byte tar header that precedes a member's data."""
    return block[:100].split(b"\0")[0].decode(errors="replace")


def _split_name(name: str) -> tuple[str, str, str]:
    """Split at the base name's first dot, as webdataset does: `a/b.c.jpg` -> `a/b`, `c.jpg`."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, dot, suffix = base.partition(".")
    return folder + slash + key, dot, suffix.lower()


def _put_once(
    table: dict[str, Any], key: str, value: Any, path: Path, member: tarfile.TarInfo
) -> None:
    if key in table:
        raise DataError(f"{path}: sample {key!r} occurs twice ({member.name}); {_REWRITE}")
    table[key] = value


def _parse_label(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = _read(archive, member).strip()
    if not re.fullmatch(rb"\d{1,6}", text):  # the manifest names every class up to the highest
        raise DataError(
            f"{path}: {member.name} holds {text[:20]!r}, not a class number of at most six "
            f"digits; {_REWRITE}"
        )
    return int(text)


def _scan_image(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, ...]:
    content = _read(archive, member)
    key = hashlib.sha256(_split_name(member.name)[0].encode()).digest()[:8]
    try:
        width, height = open_image(content).size
    except DataError as error:
        raise DataError(f"{path}: {member.name} {error}") from error
    place = (member.offset_data, member.size, zlib.crc32(content))
    return (int.from_bytes(key, "little"), *place, width, height)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "regular members have content"
    content = file.read()
    if len(content) != member.size:
        raise EOFError(f"{member.name} ends after {len(content)} of {member.size} bytes")
    return content


def _check_end(path: Path) -> None:
    """A whole tar ends in two zero blocks; one cut between two members does not."""
    with path.open("rb") as file:
        file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        if any(file.read()):
            raise DataError(f"{path} is truncated: its end mark is missing; {_REWRITE}")


def _entropy_bits(labels: NDArray[np.int32]) -> float:
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return -math.fsum(share * math.log2(share) for share in shares.tolist())


def _rebuild(folder: Path | str) -> str:
    return f"run `foveate data index {folder}`"


def _restore(folder: Path) -> str:
    return f"restore the shard, or accept the change with {_rebuild(folder)[4:]}"
