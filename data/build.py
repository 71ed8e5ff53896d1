"""Building the index of a set of shards: scanning them side by side, and writing what was found.

Owns how shards are told apart, what is scanned again, and the summary. Invariant: the same shards
give the same index, however many processes scanned them and however often they were interrupted.
Processes, not threads: of the 2.3 ms that a photograph takes, 0.25 hold the interpreter's lock, so
that threads would stop gaining at seven cores.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from data.base import DataError
from data.beton import scan_beton
from data.columns import Columns, Flag, is_made_from, pack_index, parse_index, write_atomically
from data.index import (
    MANIFEST,
    UNCHECKED,
    Manifest,
    Origin,
    ShardInfo,
    hash_file,
    say_damaged,
)
from data.location import FETCHED, Location
from data.order import entropy_bits
from data.parallel import num_cores, run_all
from data.progress import Say, counting
from data.regions import belongs, scan_regions
from data.tar import scan_tar

_READ_AHEAD = 1 << 14  # bytes that hold a member's header and an image's, where the rest is skipped


@dataclass(frozen=True, kw_only=True)
class _Task:
    """How the shards at one place are indexed."""

    location: Location
    out: Path
    label_field: str | None
    headers_only: bool
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class _Indexed:
    info: ShardInfo
    num_classes: int
    flags: Counter[Flag]


def build(
    location: Path | str,
    *,
    out: Path | None = None,
    classes: Sequence[str] | None = None,
    label_field: str | None = None,
    headers_only: bool = False,
    workers: int = 1,
    origin: Origin | None = None,
    progress: Say = print,
) -> Manifest:
    """Index every `*.tar` and `*.beton` of a folder and its folders, and write the manifest.

    `location` is a path or an fsspec URL; the index of shards elsewhere is written to the folder
    `out`. Labels are found as tar.py says, in the .json's `label_field` if named. With
    `headers_only` just the beginning of each image is read. Class names default to the numbers. A
    shard that has an index made from its very bytes is not scanned again. Raises DataError naming
    the shard that is truncated, or lacks a label, an image or a class.
    """
    place = Location(str(location))
    folder = out or place.folder
    if folder is None:
        raise DataError(f"{location} is elsewhere: name a folder for its index with --out")
    names = place.shards()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_torn(folder)
    task = _Task(location=place, out=folder, label_field=label_field, headers_only=headers_only)
    found = _index_all(task, names, workers, progress)
    shards = tuple(shard.info for shard in found)
    num_classes = max(shard.num_classes for shard in found)
    class_names = _name_classes(str(location), num_classes, classes)
    elsewhere = place.folder is None or place.folder.resolve() != folder.resolve()
    manifest = Manifest(
        shards=shards,
        classes=class_names,
        base=_absolute(place) if elsewhere else None,
        origin=origin or _known_origin(folder, shards, class_names),
    )
    write_atomically(folder / MANIFEST, manifest.to_json().encode())
    _summarise(manifest, sum((shard.flags for shard in found), Counter[Flag]()), progress)
    say_damaged(folder, manifest, progress)
    progress(f"wrote {folder / MANIFEST}")
    return manifest


def _index_all(task: _Task, names: Sequence[str], workers: int, progress: Say) -> list[_Indexed]:
    """Index the shards of these names; cores without a shard of their own help with its regions."""
    task = replace(task, threads=max(1, num_cores() // max(1, min(workers, len(names)))))
    indexed: dict[int, _Indexed] = {}
    with counting(len(names), "shard", progress) as done:
        for number, shard in run_all(_index_shard, task, names, workers=workers):
            indexed[number] = shard
            path = task.out / shard.info.name
            done(1, f"indexed {path} ({shard.info.num_samples} samples)")
    return [indexed[number] for number in range(len(names))]


def scan(
    file: IO[bytes], name: str, *, label_field: str | None = None, headers_only: bool = False
) -> Columns:
    """Return the index columns of a tar or .beton in a seekable `file`, told apart by `name`.

    Raises DataError naming the shard and the member at fault.
    """
    if name.endswith(".beton"):
        return scan_beton(file, name, headers_only=headers_only)
    return scan_tar(file, name, label_field=label_field, headers_only=headers_only)


def _remove_torn(folder: Path) -> None:
    """Remove what a process that was killed had not finished."""
    for suffix in (".idx", ".roi"):
        for path in folder.rglob(f"*{suffix}.part*"):
            path.unlink()
    for path in folder.glob(f"{FETCHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _index_shard(task: _Task, name: str) -> _Indexed:
    target = (task.out / name).with_suffix(".idx")
    target.parent.mkdir(parents=True, exist_ok=True)
    shown = f"{task.location.url}/{name}"
    scan_as = partial(scan, label_field=task.label_field, headers_only=task.headers_only)
    if task.headers_only:
        num_bytes, version = task.location.version(name)
        made_from = f"headers {version} {task.label_field}"
        with task.location.opened(name, read_ahead=_READ_AHEAD) as file:
            content = _reuse(target, made_from, num_bytes) or pack_index(
                scan_as(file, shown), num_bytes=num_bytes, made_from=made_from
            )
        write_atomically(target, content)
        target.with_suffix(".roi").unlink(missing_ok=True)  # of an earlier index
        return _indexed(name, None, num_bytes, content)
    with task.location.local(name, task.out) as path, path.open("rb") as file:
        num_bytes, sha256 = path.stat().st_size, hash_file(path)
        made_from = f"bytes {sha256} {task.label_field}"
        content = _reuse(target, made_from, num_bytes) or pack_index(
            scan_as(file, shown), num_bytes=num_bytes, made_from=made_from
        )
        write_atomically(target, content)
        indexed = _indexed(name, sha256, num_bytes, content)
        _write_regions(path, target, content, indexed.info, threads=task.threads)
    return indexed


def _reuse(index: Path, made_from: str, num_bytes: int) -> bytes | None:
    """Return the content of an index if it is whole and what a scan would return again."""
    content = index.read_bytes() if index.is_file() else b""
    return content if is_made_from(content, made_from, num_bytes=num_bytes) else None


def _indexed(name: str, sha256: str | None, num_bytes: int, content: bytes) -> _Indexed:
    columns = parse_index(content)
    assert columns is not None, "it was packed just now, or found whole"
    info = ShardInfo(
        name=name,
        num_samples=len(columns["label"]),
        num_bytes=num_bytes,
        sha256=sha256,
        index_sha256=hashlib.sha256(content).hexdigest(),
        class_entropy=round(entropy_bits(columns["label"]), 4) + 0.0,  # not -0.0
    )
    flags = Counter({flag: int((columns["flags"] & flag > 0).sum()) for flag in Flag})
    return _Indexed(info=info, num_classes=int(columns["label"].max()) + 1, flags=flags)


def _write_regions(
    shard: Path, index: Path, content: bytes, info: ShardInfo, *, threads: int
) -> None:
    target = index.with_suffix(".roi")
    columns = parse_index(content)
    assert columns is not None, "it was packed just now, or found whole"
    is_jpeg = columns["flags"] & (Flag.NOT_JPEG | Flag.RAW | Flag.CORRUPT) == 0
    if belongs(target, num_samples=info.num_samples, index_sha256=info.index_sha256):
        return
    regions = scan_regions(
        shard,
        columns["offset"],
        np.where(is_jpeg, columns["size"], 0),
        index_sha256=info.index_sha256,
        threads=threads,
    )
    if regions is None:
        target.unlink(missing_ok=True)  # an earlier shard's
    else:
        write_atomically(target, regions)


def _name_classes(location: str, num_classes: int, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(num_classes)))
    if len(names) < num_classes:
        raise DataError(
            f"{location}: label {num_classes - 1} has no name among the {len(names)} classes given"
        )
    return tuple(names)


def _known_origin(
    folder: Path, shards: Sequence[ShardInfo], classes: Sequence[str]
) -> Origin | None:
    """Return the origin that the folder's manifest names for these very shards, if it does."""
    try:
        known = Manifest.load(folder)
    except DataError:  # a missing or unreadable one is what is being written
        return None
    if any(shard.sha256 is None for shard in shards) or known.classes != tuple(classes):
        return None
    same = [(shard.name, shard.sha256) for shard in known.shards] == [
        (shard.name, shard.sha256) for shard in shards
    ]
    return known.origin if same else None


def _absolute(place: Location) -> str:
    return place.url if place.folder is None else str(place.folder.resolve())


def _summarise(manifest: Manifest, flags: Counter[Flag], progress: Say) -> None:
    """Say what is unusual about the samples."""
    shown = {
        Flag.PROGRESSIVE: "progressive",
        Flag.CMYK: "of four colours",
        Flag.GREY: "grey",
        Flag.ROTATED: "with an EXIF orientation, which is ignored",
        Flag.NOT_JPEG: "not JPEG",
        Flag.RAW: "raw pixels",
    }
    counts = [f"{flags[flag]} {text}" for flag, text in shown.items() if flags[flag]]
    if counts:
        progress(f"of {manifest.num_samples} images: {', '.join(counts)}")
    if flags[Flag.NO_CRC]:
        progress(UNCHECKED)
