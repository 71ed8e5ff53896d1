"""The index of a set of shards, tar or .beton: where every sample lies, and that nothing changed.

Beside each shard `NAME.tar` stands `NAME.idx` (columns.py), and `NAME.roi` (regions.py) if its
images are JPEG files. `manifest.json` lists the shards in canonical order with their sizes and
hashes; its own hash is the fingerprint of the data set. Sizes and index hashes are checked when a
set is opened, shard hashes by `verify`, each sample's CRC when it is read. Shards that lie
elsewhere have their index in a folder here, whose manifest says where they are. Invariant: every
file is written beside and renamed into place, the manifest last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data.base import DataError
from data.columns import INDEX_FORMAT, Columns, Flag, parse_index
from data.location import Location
from data.parallel import check_workers
from data.progress import Say, counting
from data.regions import belongs
from data.tar import member_name

MANIFEST = "manifest.json"
UNCHECKED = (
    "NOTE: of the images only headers were read: the index has no CRC and no hash of the shards, "
    "so that damage and changes are not noticed unless an image fails to decode"
)
_BLOCK = 1 << 22  # bytes hashed at a time
_HEADER_BYTES = 512  # of a tar's member


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest says of one shard.

    `name` is its path from the folder. `sha256` is None where only headers were read.
    `class_entropy` is the entropy of its labels in bits: close to the whole set's where the set
    was shuffled when written, 0 where a shard holds one class.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str | None
    index_sha256: str
    class_entropy: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The set that this one holds the same samples as, in the same order, in other shards."""

    fingerprint: str
    shard_sizes: tuple[int, ...]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Origin:
        """Read what JSON made of it."""
        return cls(fingerprint=fields["fingerprint"], shard_sizes=tuple(fields["shard_sizes"]))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`: shards in canonical order, and class names by label.

    `base` is where the shards lie if not beside it. With an `origin`, order and cursors are that
    one's, so that a run can change from one to the other.
    """

    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...]
    base: str | None = None
    origin: Origin | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Of the canonical JSON form without `base` and `origin`, in hexadecimal."""
        return hashlib.sha256(json.dumps(self._fields(), indent=1).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """The origin's, or `sha256`."""
        return self.sha256 if self.origin is None else self.origin.fingerprint

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Number of samples in each shard of which the order is made, int64 [num_shards]."""
        if self.origin is not None:
            return np.array(self.origin.shard_sizes, np.int64)
        return np.array([shard.num_samples for shard in self.shards], np.int64)

    def to_json(self) -> str:
        """Return the canonical JSON text."""
        more = {"base": self.base, "origin": self.origin and asdict(self.origin)}
        return json.dumps(self._fields() | {k: v for k, v in more.items() if v}, indent=1)

    def location(self, folder: Path) -> Location:
        """Return where the shards lie, given the manifest's folder."""
        return Location(str(folder) if self.base is None else self.base)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder`/manifest.json; raises DataError if it is missing or not one."""
        path = folder / MANIFEST
        try:
            return cls.parse(path.read_bytes(), str(folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{path} is missing{_instead(folder)}") from error
        except OSError as error:
            raise DataError(f"{path} is unreadable ({error!r}); {rebuild(folder)}") from error

    @classmethod
    def parse(cls, content: bytes, folder: str) -> Manifest:
        """Read the manifest of `folder`, a path or a URL; raises DataError if it is not one."""
        path = f"{folder}/{MANIFEST}"
        try:
            fields = json.loads(content)
            if fields["format"] != INDEX_FORMAT:
                raise DataError(
                    f"{path}: format {fields['format']} is not {INDEX_FORMAT}; {rebuild(folder)}"
                )
            origin = fields.get("origin")
            manifest = cls(
                shards=tuple(ShardInfo(**shard) for shard in fields["shards"]),
                classes=tuple(fields["classes"]),
                base=fields.get("base"),
                origin=None if origin is None else Origin.from_dict(origin),
            )
            manifest._check(path)
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is unreadable ({error!r}); {rebuild(folder)}") from error
        return manifest

    def _check(self, path: str) -> None:
        """Raise DataError for names that lead out of the folder, and for another set's origin."""
        for shard in self.shards:
            parts = PurePosixPath(shard.name).parts
            if not parts or parts[0] == "/" or ".." in parts:
                raise DataError(f"{path} names a shard {shard.name!r} outside of its folder")
        if self.shard_sizes.sum() != self.num_samples:
            raise DataError(
                f"{path} has {self.num_samples} samples, its origin {self.shard_sizes.sum()}; "
                "pack the set again"
            )

    def _fields(self) -> dict[str, Any]:
        shards = [asdict(shard) for shard in self.shards]
        fields = {"format": INDEX_FORMAT, "total": self.num_samples, "shards": shards}
        return fields | {"classes": self.classes}


def known_classes(folder: Path) -> tuple[str, ...] | None:
    """Return the class names in the manifest of a folder, whatever its format, if it has any."""
    try:
        return tuple(map(str, json.loads((folder / MANIFEST).read_bytes())["classes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify(folder: Path, *, workers: int = 1, progress: Say = print) -> Manifest:
    """Hash every shard; raises one DataError that lists all that differ from the manifest."""
    check_workers(workers)
    manifest = Manifest.load(folder)
    problems = []
    task = partial(_verify_shard, folder, manifest)
    with (
        ThreadPoolExecutor(workers) as pool,
        counting(len(manifest.shards), "shard", progress) as done,
    ):
        for shard, problem in zip(manifest.shards, pool.map(task, manifest.shards), strict=True):
            problems += [problem] if problem else []
            unread = "" if shard.sha256 else " in size; it was indexed from headers alone"
            done(1, problem or f"ok {folder / shard.name}{unread}")
    if problems:
        raise DataError("; ".join(problems))
    if any(shard.sha256 is None for shard in manifest.shards):
        progress(UNCHECKED)
    say_damaged(folder, manifest, progress)
    return manifest


def say_damaged(folder: Path, manifest: Manifest, say: Say) -> None:
    """Name the images that were damaged when they were indexed, and say how many they are."""
    location, count = manifest.location(folder), 0
    for shard in manifest.shards:
        columns = check_index(folder, shard)
        rows = np.flatnonzero(columns["flags"] & Flag.CORRUPT).tolist()
        count += len(rows)
        if rows:
            with location.opened(shard.name, read_ahead=_HEADER_BYTES) as file:
                for row in rows:
                    member = sample_name(shard, row, columns, partial(_read_at, file))
                    say(f"damaged: {location.url}/{shard.name}:{member}")
    if count:
        say(
            f"NOTE: {count} of {manifest.num_samples} images are damaged: runs use others in "
            "their place; replace them and index again"
        )


def sample_name(
    shard: ShardInfo, row: int, columns: Columns, read: Callable[[int, int], bytes]
) -> str:
    """Return the member that holds the image of a shard's `row`; in a .beton, its number.

    `read` returns bytes of the shard, given where and how many.
    """
    if not shard.name.endswith(".tar"):
        return str(row)
    return member_name(read(int(columns["offset"][row]) - _HEADER_BYTES, _HEADER_BYTES))


def check_shard(folder: Path, shard: ShardInfo) -> Columns:
    """Check the size of a shard in `folder`, and its index, and return the index's columns.

    Raises DataError naming the shard and the remedy.
    """
    path = folder / shard.name
    if not path.is_file():
        raise DataError(f"{path} is missing (was it renamed?); {_restore(folder)}")
    _check_size(path, path.stat().st_size, shard, folder)
    return check_index(folder, shard)


def check_index(folder: Path, shard: ShardInfo) -> Columns:
    """Check a shard's index in `folder`, and return its columns; raises DataError naming it."""
    index = folder / index_name(shard)
    try:
        content = index.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{index} is missing; {rebuild(folder)}") from error
    except OSError as error:
        raise DataError(f"{index} cannot be read ({error.strerror}); make it readable") from error
    return read_columns(content, shard, str(folder))


def read_columns(content: bytes, shard: ShardInfo, folder: str) -> Columns:
    """Return the columns in the index of a shard of `folder`, a path or a URL.

    Raises DataError if it is not the one that the manifest means.
    """
    index = f"{folder}/{index_name(shard)}"
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise DataError(f"{index} does not belong to the manifest; {rebuild(folder)}")
    columns = parse_index(content)
    if columns is None:
        raise DataError(f"{index} is not an index of format {INDEX_FORMAT}; {rebuild(folder)}")
    return columns


def index_name(shard: ShardInfo) -> str:
    """Return the path of a shard's index from the folder."""
    return str(PurePosixPath(shard.name).with_suffix(".idx"))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hash_stream(file)


def hash_stream(file: IO[bytes]) -> str:
    """Return the SHA-256 of what can be read of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def rebuild(folder: Path | str) -> str:
    """Return what to run where an index does not fit."""
    return f"run `foveate data index {folder}`"


def _instead(folder: Path) -> str:
    """Return what to do where a folder has no manifest."""
    if not folder.is_dir():
        return f": there is no folder {folder}; name another"
    if any(folder.glob("*/")):
        return f"; {rebuild(folder)}, or pack it if it holds CLASS/IMAGE: `foveate data pack`"
    return f"; {rebuild(folder)}"


def _read_at(file: IO[bytes], offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)


def _verify_shard(folder: Path, manifest: Manifest, shard: ShardInfo) -> str | None:
    """Return what is wrong with a shard, or None."""
    location = manifest.location(folder)
    shown = f"{location.url}/{shard.name}"
    try:
        if manifest.base is None:
            check_shard(folder, shard)
        else:
            check_index(folder, shard)
            _check_size(shown, location.version(shard.name)[0], shard, folder)
        if shard.sha256 is not None:
            with location.opened(shard.name, read_ahead=_BLOCK) as file:
                if hash_stream(file) != shard.sha256:
                    raise DataError(f"{shown} was altered; {_restore(folder)}")
        regions = (folder / shard.name).with_suffix(".roi")
        if regions.is_file() and not belongs(
            regions, num_samples=shard.num_samples, index_sha256=shard.index_sha256
        ):
            raise DataError(f"{regions} does not belong to its index; {rebuild(folder)}")
    except DataError as error:
        return str(error)
    return None


def _check_size(path: Path | str, found: int, shard: ShardInfo, folder: Path) -> None:
    if found != shard.num_bytes:
        fault = "truncated" if found < shard.num_bytes else "altered"
        raise DataError(
            f"{path} is {fault}: {found} bytes instead of {shard.num_bytes}; {_restore(folder)}"
        )


def _restore(folder: Path) -> str:
    return f"restore the shard, or accept the change with {rebuild(folder)[4:]}"
