"""Packing: any source -> tar shards in a seeded random order, with index and manifest.

Owns what a packed data set looks like on disk. Invariant: the output folder appears whole or not
at all: everything is written in a folder beside it, which is renamed when the manifest is in
place. The same source, seed and shard size give the same bytes.
webdataset writes the tars, so that every tool that reads its format reads ours; psutil knows
whether the process that left a folder behind is gone.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import webdataset
from numpy.typing import NDArray

from data.base import DataError, Source
from data.decode import open_image
from data.folder import FolderSource, encode_png
from data.index import MANIFEST, Manifest, build, check_shard
from data.order import FullShuffle

RECIPE = "pack.json"  # what the shards were packed from: tells a finished job from another one
SPLITS = ("train", "val")


def pack_folder(
    folder: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> list[Path]:
    """Pack `folder`/CLASS/IMAGE into `out`, or each of `folder`/{train,val} into `out`/{train,val}.

    Returns the folders that hold the shards. Raises DataError as `pack` does.
    """
    splits = [split for split in SPLITS if (folder / split).is_dir()]
    jobs = [(folder / split, out / split) for split in splits] or [(folder, out)]
    for source, target in jobs:
        pack(
            FolderSource(source),
            target,
            samples_per_shard=samples_per_shard,
            seed=seed,
            progress=progress,
        )
    return [target for _, target in jobs]


def pack(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> Manifest:
    """Write `source`, shuffled by `seed`, as shards of about `samples_per_shard` into `out`.

    A finished `out` of the same recipe is left alone. Raises DataError if `out` holds anything
    else, or a sample cannot be read.
    """
    recipe = {
        "source": source.fingerprint,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
    }
    if (out / MANIFEST).is_file():
        return _accept(out, recipe, progress)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is in the way: it holds no packed data set; remove or rename it")
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard {samples_per_shard} must be at least 1")
    if out.resolve() == Path.cwd():
        raise DataError(f"{out} is the current folder, which cannot be replaced; name another")
    beside = _folder_beside(out)
    try:
        _write_shards(source, beside, out, samples_per_shard, seed, progress)
        manifest = build(beside, classes=source.classes, progress=lambda _: None)
        (beside / RECIPE).write_text(json.dumps(recipe))
        try:
            beside.rename(out)
        except OSError:
            if not (out / MANIFEST).is_file():
                raise
            return _accept(out, recipe, progress)  # another process was faster
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    progress(f"packed {len(source)} samples into {len(manifest.shards)} shards: {out / MANIFEST}")
    return manifest


def _folder_beside(out: Path) -> Path:
    """Make a folder that no other process packs into; remove what killed ones left beside `out`."""
    prefix = f".{out.name}.part-{socket.gethostname()}-"
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{prefix}{os.getpid()}")
    for path in out.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix)
        if path == beside or (pid.isdecimal() and not psutil.pid_exists(int(pid))):
            shutil.rmtree(path, ignore_errors=True)
    beside.mkdir()
    return beside


def _write_shards(
    source: Source,
    folder: Path,
    out: Path,
    samples_per_shard: int,
    seed: int,
    progress: Callable[[str], None],
) -> None:
    order = FullShuffle(num_samples=len(source), seed=seed).ids(0, np.arange(len(source)))
    num_shards = -(-len(source) // samples_per_shard)
    first = 0
    for number, ids in enumerate(np.array_split(order, num_shards)):
        name = f"{out.name}-{number:06d}.tar"
        _write_shard(folder / name, source, ids, first)
        first += len(ids)
        if number == num_shards - 1 or number * 10 // num_shards < (number + 1) * 10 // num_shards:
            progress(f"wrote {first} of {len(source)} samples, up to {out / name}")


def _write_shard(path: Path, source: Source, ids: NDArray[np.int64], first: int) -> None:
    # A whole number for mtime: a fraction would cost a PAX header of 1 KB per member.
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for position, id in enumerate(ids.tolist(), start=first):
            sample = source.read(id)
            image = sample.image if isinstance(sample.image, bytes) else encode_png(sample.image)
            suffix = _suffix(image, source, id)
            key = f"{position:09d}"
            writer.write({"__key__": key, suffix: image, "cls": sample.label})


def _suffix(image: bytes, source: Source, id: int) -> str:
    """Return png or jpg, by content; raises DataError naming the sample if it is neither."""
    try:
        return "png" if open_image(image).format == "PNG" else "jpg"
    except DataError as error:
        raise DataError(f"{source.name(id)} {error}") from error


def _accept(out: Path, recipe: dict[str, object], progress: Callable[[str], None]) -> Manifest:
    """Return the manifest of a finished `out`; raises DataError if it was packed otherwise."""
    if _recipe_of(out) != recipe:
        raise DataError(
            f"{out} already holds a data set packed from other data or with other settings; "
            "remove it, or choose another folder"
        )
    manifest = Manifest.load(out)
    for shard in manifest.shards:
        check_shard(out, shard)
    progress(f"{out / MANIFEST} is there already")
    return manifest


def _recipe_of(out: Path) -> object:
    """Return what `out` was packed from, or None where nothing readable says so."""
    try:
        return json.loads((out / RECIPE).read_text())
    except (FileNotFoundError, ValueError):
        return None
