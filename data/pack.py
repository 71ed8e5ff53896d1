"""Packing: any source -> tar shards or one .beton file, with index and manifest.

Owns what a packed data set looks like on disk, and how packing is continued. Invariants: the
output folder appears whole or not at all: everything is written in a folder beside it, which is
renamed when the manifest is in place; and what is finished there is taken up by the next try, once
the process that left it is gone. The same source and settings give the same bytes, however many
processes wrote them.
webdataset writes the tars, so that every tool that reads its format reads ours; psutil knows
whether the process that left a folder behind is gone.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import webdataset
from numpy.typing import NDArray

from data.base import DataError, Source
from data.betonpack import IMAGE_MODES, join_parts, write_part
from data.build import build
from data.columns import room_for, write_atomically
from data.decode import IMAGE_SUFFIXES, PNG_MAGIC, Damaged, open_image
from data.folder import FolderSource, encode_png
from data.index import MANIFEST, Manifest, Origin, check_shard, say_damaged
from data.order import FullShuffle
from data.parallel import run_all
from data.progress import Say, counting
from data.webdataset import TarSource, read_stored

RECIPE = "pack.json"  # what the shards were packed from: tells a finished job from another one
SPLITS = ("train", "val")
FORMATS = ("tar", "beton")
_OWN_SUFFIXES = ("", "cls", *IMAGE_SUFFIXES)  # of a tar's members, those that packing writes anew
_PART_SUFFIX = ".samples"  # of what a .beton is joined from


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What is packed, and how; all that the bytes depend on."""

    source: Source
    name: str
    format: str
    image_mode: str
    samples_per_shard: int
    seed: int

    def check(self) -> None:
        """Raise DataError for settings that cannot be."""
        if self.format not in FORMATS:
            raise DataError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        if self.image_mode not in IMAGE_MODES:
            raise DataError(
                f"image_mode {self.image_mode!r} is not one of {', '.join(IMAGE_MODES)}"
            )
        if self.samples_per_shard < 1:
            raise DataError(f"samples_per_shard {self.samples_per_shard} must be at least 1")

    @property
    def recipe(self) -> dict[str, Any]:
        """What is written down, to know it again."""
        recipe = {
            "source": self.source.fingerprint,
            "seed": self.seed,
            "samples_per_shard": self.samples_per_shard,
        }
        if self.format == "tar":
            return recipe
        return recipe | {"format": self.format, "image_mode": self.image_mode}

    @property
    def keeps_order(self) -> bool:
        """Whether samples stay in the order of an indexed set, that runs may change to this one."""
        return self.format == "beton" and isinstance(self.source, TarSource)

    @property
    def keeps_names(self) -> bool:
        """Whether samples go from tar to tar under their own names."""
        return self.format == "tar" and isinstance(self.source, TarSource) and self.source.has_names

    def jobs(self) -> list[_Job]:
        """Return the files to write, in order."""
        ids = np.arange(len(self.source))
        if not self.keeps_order:
            ids = FullShuffle(num_samples=len(ids), seed=self.seed).ids(0, ids)
        parts = np.array_split(ids, -(-len(ids) // self.samples_per_shard))
        suffix = ".tar" if self.format == "tar" else _PART_SUFFIX
        firsts, keeps_names = np.cumsum([0, *map(len, parts)]).tolist(), self.keeps_names
        return [
            _Job(
                name=f"{self.name}-{number:06d}{suffix}",
                ids=part,
                first=firsts[number],
                keeps_names=keeps_names,
            )
            for number, part in enumerate(parts)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """A file to write: the samples `ids`, int64 [n], the first of which is number `first`.

    With `keeps_names` a tar's samples have those of the source, else their numbers.
    """

    name: str
    ids: NDArray[np.int64]
    first: int
    keeps_names: bool


def pack_folder(
    folder: Path,
    out: Path,
    *,
    format: str = "tar",
    image_mode: str = "jpg",
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = 1,
    progress: Say = print,
) -> list[Path]:
    """Pack `folder` into `out`, or each of `folder`/{train,val} into `out`/{train,val}.

    A folder holds CLASS/IMAGE, or shards with their manifest. Returns the folders that hold the
    result. Raises DataError as `pack` does.
    """
    splits = [split for split in SPLITS if (folder / split).is_dir()]
    jobs = [(folder / split, out / split) for split in splits] or [(folder, out)]
    for place, target in jobs:
        if target.resolve().is_relative_to(place.resolve()):
            raise DataError(
                f"{target} is within {place}, of which it would be a part; name another"
            )
        source = TarSource(place) if (place / MANIFEST).is_file() else FolderSource(place)
        pack(
            source,
            target,
            format=format,
            image_mode=image_mode,
            samples_per_shard=samples_per_shard,
            seed=seed,
            workers=workers,
            progress=progress,
        )
    return [target for _, target in jobs]


def pack(
    source: Source,
    out: Path,
    *,
    format: str = "tar",
    image_mode: str = "jpg",
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = 1,
    progress: Say = print,
) -> Manifest:
    """Write `source` into `out`: as tars of about `samples_per_shard` images, or as one .beton.

    Samples are shuffled by `seed`; but an indexed set that becomes a .beton keeps its order and
    its fingerprint, and a run on the one can go on with the other. In a .beton images are JPEG
    files (`image_mode` jpg; what is none becomes pixels), decoded pixels (raw), or pixels where
    they are few (mixed). A finished `out` of the same recipe is left alone; what another try
    has finished is taken up. Raises DataError if `out` holds anything else, a sample cannot be
    read, or the disk is full.
    """
    settings = _Settings(
        source=source,
        name=out.name,
        format=format,
        image_mode=image_mode,
        samples_per_shard=samples_per_shard,
        seed=seed,
    )
    if (out / MANIFEST).is_file():
        return _accept(out, settings.recipe, progress)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is in the way: it holds no packed data set; remove or rename it")
    settings.check()
    if out.resolve() == Path.cwd():
        raise DataError(f"{out} is the current folder, which cannot be replaced; name another")
    beside = _claim_folder(out, settings.recipe)
    try:
        manifest = _pack_beside(settings, beside, out, workers, progress)
        try:
            beside.rename(out)
        except OSError:
            if not (out / MANIFEST).is_file():
                raise
            shutil.rmtree(beside, ignore_errors=True)
            return _accept(out, settings.recipe, progress)  # another process was faster
    finally:
        _leave(beside, progress)
    say_damaged(out, manifest, progress)
    _say_what_stays_behind(settings, progress)
    progress(f"packed {len(source)} samples into {len(manifest.shards)} shards: {out / MANIFEST}")
    return manifest


def _say_what_stays_behind(settings: _Settings, progress: Say) -> None:
    """Say what the samples of tars lose on their way."""
    source = settings.source
    if not isinstance(source, TarSource) or not source.is_tar:
        return
    if settings.format == "beton":
        progress(
            "NOTE: a .beton holds images and classes alone: names and other members stay behind"
        )
    elif not settings.keeps_names:
        progress("NOTE: several samples have the same name, in different shards: all are numbered")


def _pack_beside(
    settings: _Settings, folder: Path, out: Path, workers: int, progress: Say
) -> Manifest:
    """Write shards, index and manifest into `folder`, beside `out`."""
    source = settings.source
    with room_for(out):
        target = folder / f"{out.name}.beton"
        if not target.is_file():  # which has all of them in it
            _write_all(settings, folder, out, workers, progress)
        if settings.format == "beton":
            parts = sorted(folder.glob(f"*{_PART_SUFFIX}"))
            if not target.is_file():
                join_parts(parts, target)
            for part in parts:
                part.unlink()
        origin = None
        if settings.keeps_order:
            sizes = tuple(source.shard_sizes.tolist())
            origin = Origin(fingerprint=source.fingerprint, shard_sizes=sizes)
        return build(
            folder,
            classes=source.classes,
            origin=origin,
            workers=workers,
            progress=lambda _: None,
        )


def _write_all(settings: _Settings, folder: Path, out: Path, workers: int, progress: Say) -> None:
    """Write the files that are not there yet."""
    jobs, total = settings.jobs(), len(settings.source)
    missing = [job for job in jobs if not (folder / job.name).is_file()]
    finished = total - sum(len(job.ids) for job in missing)
    if finished:
        progress(f"continuing after {finished} of {total} samples")
    with counting(total, "image", progress, finished=finished) as done:
        shared = (settings, folder)
        for number, _ in run_all(_write_file, shared, missing, workers=workers):
            job = missing[number]
            name = job.name if settings.format == "tar" else f"{out.name}.beton"
            done(len(job.ids), f"wrote {len(job.ids)} samples for {out / name}")


def _write_file(shared: tuple[_Settings, Path], job: _Job) -> None:
    """Write one file, which has its name when it is whole."""
    settings, folder = shared
    beside = folder / f"{job.name}.part{os.getpid()}"
    try:
        with beside.open("wb") as file:
            if settings.format == "tar":
                _write_tar(file, settings.source, job)
            else:
                write_part(file, settings.source, job.ids, settings.image_mode)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(folder / job.name)
    finally:
        beside.unlink(missing_ok=True)


def _write_tar(file: IO[bytes], source: Source, job: _Job) -> None:
    # A whole number for mtime: a fraction would cost a PAX header of 1 KB per member. The encoder
    # would compress what is compressed.
    with webdataset.TarWriter(file, mtime=0, encoder=False, keep_meta=True) as writer:
        for position, id in enumerate(job.ids.tolist(), start=job.first):
            sample = read_stored(source, id)
            image = sample.image if isinstance(sample.image, bytes) else encode_png(sample.image)
            name, members = None, dict[str, bytes]()
            if isinstance(source, TarSource) and source.is_tar:
                name, members = source.read_members(id)
            members = {key: value for key, value in members.items() if key not in _OWN_SUFFIXES}
            members |= {_suffix(image, source, id): image, "cls": b"%d" % sample.label}
            key = f"{position:09d}"
            if job.keeps_names:
                key = name or f"link-{key}"
            writer.write({"__key__": key, **members})


def _claim_folder(out: Path, recipe: dict[str, Any]) -> Path:
    """Make a folder beside `out` that no other process packs into, for `recipe`.

    What a process that is gone left of the same recipe is taken over; of another, removed.
    """
    prefix = f".{out.name}.part-{socket.gethostname()}-"
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{prefix}{os.getpid()}")
    for path in sorted(out.parent.glob(f"{glob.escape(prefix)}*")):
        pid = path.name.removeprefix(prefix)
        if path != beside and not (pid.isdecimal() and not psutil.pid_exists(int(pid))):
            continue
        if _recipe_of(path) != recipe or (path != beside and beside.exists()):
            shutil.rmtree(path, ignore_errors=True)
            continue
        with suppress(FileNotFoundError):  # another process was faster
            path.rename(beside)
    beside.mkdir(exist_ok=True)
    for torn in beside.glob("*.part*"):
        torn.unlink()
    with room_for(out):
        write_atomically(beside / RECIPE, json.dumps(recipe).encode())
    return beside


def _leave(beside: Path, progress: Say) -> None:
    """Keep what a failed try has finished, and remove what is of no use."""
    if any(path.suffix in (".tar", ".beton", _PART_SUFFIX) for path in beside.glob("*")):
        progress(f"what is finished is kept in {beside} for the next try")
    else:
        shutil.rmtree(beside, ignore_errors=True)


def _suffix(image: bytes, source: Source, id: int) -> str:
    """Return png or jpg, by content; raises DataError naming the sample if it is neither.

    A damaged image keeps its place: the index says that it is.
    """
    try:
        open_image(image)
    except Damaged:
        pass
    except DataError as error:
        raise DataError(f"{source.name(id)} {error}") from error
    return "png" if image.startswith(PNG_MAGIC) else "jpg"


def _accept(out: Path, recipe: dict[str, Any], progress: Say) -> Manifest:
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
