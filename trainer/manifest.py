"""Manifests: which folders are whole checkpoints, and which start of a run may write one.

The invariant: a checkpoint folder appears under its name in one rename, after every file in it,
the manifest last, has reached the disk. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import UserError

MANIFEST = "MANIFEST.json"
_REPLACED = "replaced_"  # begins the name of a checkpoint while another takes its place
_REMOVED = "removed_"  # and of a folder on its way out


class Fenced(UserError):
    """A newer start of this run owns the folder: this one must stop without writing."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and SHA-256 of one file of a checkpoint."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds: its files, and the trainer's record of the moment it was taken."""

    step: int
    generation: int
    files: tuple[FileRecord, ...]
    record: dict[str, Any]

    def to_json(self) -> str:
        """Return the JSON text, which carries its own hash."""
        values = asdict(self)
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        return json.dumps({"sha256": digest, **values}, indent=1)


def describe(path: Path) -> FileRecord:
    """Hash one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(name=path.name, num_bytes=path.stat().st_size, sha256=digest)


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint taken after `step` steps."""
    return root / f"step_{step:010d}"


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step_"))


def staging_folder(root: Path, step: int, generation: int) -> Path:
    """Return the folder in which generation `generation` writes it before it is whole."""
    return root / f"writing_{step:010d}_by_{generation:05d}"


def commit(root: Path, manifest: Manifest) -> Path:
    """Make the staged files of `manifest.step` a checkpoint and return its folder.

    Raises:
        Fenced: if a newer start of the run has begun.
    """
    staged = staging_folder(root, manifest.step, manifest.generation)
    write_atomically(staged / MANIFEST, manifest.to_json())
    check_generation(root, manifest.generation)
    final = step_folder(root, manifest.step)
    aside = root / f"{_REPLACED}{final.name}"
    if final.exists():
        final.rename(aside)
    try:
        staged.rename(final)
    except FileNotFoundError:  # a newer start has just taken it away
        if aside.exists():
            aside.rename(final)
        check_generation(root, manifest.generation)
        raise
    sync_folder(root)
    if aside.exists():
        shutil.rmtree(aside)
    return final


def remove(folder: Path) -> None:
    """Delete a checkpoint, manifest first, so that what is left of it is never taken for whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    sync_folder(folder)
    shutil.rmtree(folder)


def remove_from(root: Path, step: int) -> None:
    """Remove the checkpoints of `step` and later ones, the newest first."""
    for folder in reversed(checkpoints(root)):
        if step_of(folder) >= step:
            remove(folder)


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises:
        ValueError: if it is missing, not a manifest, or altered.
    """
    try:
        return parse((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {MANIFEST}, so it was never completed") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} {error}") from None


def parse(text: str) -> Manifest:
    """Read what to_json() returned.

    Raises:
        ValueError: if it is not a manifest, or altered.
    """
    try:
        values = json.loads(text)
        del values["sha256"]
        values["files"] = tuple(FileRecord(**record) for record in values["files"])
        found = Manifest(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot be read: {error}") from None
    if found.to_json() != text:
        raise ValueError("does not match its hash")
    return found


def problems(folder: Path, files: Iterable[FileRecord]) -> Iterator[str]:
    """Yield what is wrong with the files of a checkpoint, compared with its manifest."""
    for record in files:
        path = folder / record.name
        try:
            size = path.stat().st_size
            if size != record.num_bytes:
                yield f"{path} has {size} bytes instead of {record.num_bytes}"
            elif describe(path) != record:
                yield f"{path} does not match its hash"
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"


def damage(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint, its every file hashed: nothing if it is good."""
    try:
        return list(problems(folder, read(folder).files))
    except ValueError as error:
        return [str(error)]


def checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    return sorted(root.glob(f"step_{'[0-9]' * 10}"))


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files all match, and why newer ones were skipped."""
    skipped: list[str] = []
    for folder in reversed(checkpoints(root)):
        wrong = damage(folder)
        if not wrong:
            return folder, skipped
        skipped.append("; ".join(wrong))
    return None, skipped


def whole_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`, a run folder's newest good one or the folder itself.

    Raises:
        UserError: if there is none that is whole.
    """
    if (path / "checkpoints").is_dir():
        found, skipped = newest_good(path / "checkpoints")
        if found is None:
            raise UserError("; ".join(skipped) or f"{path} has no checkpoint yet")
        return found
    if wrong := damage(path):
        raise UserError(f"{path} is neither a run folder nor a whole checkpoint: {wrong[0]}")
    return path


def begin_generation(root: Path) -> int:
    """Raise the run's generation number, fencing off every earlier start, and return it."""
    root.mkdir(parents=True, exist_ok=True)
    generation = newest_generation(root) + 1
    write_atomically(root / "generation", str(generation))
    for left in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in root.glob("writing_*"):
        # Taken away in one piece: a stale writer can put nothing half-removed into place.
        away = left.rename(root / f"{_REMOVED}{left.name}")
        shutil.rmtree(away, ignore_errors=True)
    for aside in root.glob(f"{_REPLACED}*"):
        final = root / aside.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:  # a crash came before its replacement
            aside.rename(final)
    return generation


def check_generation(root: Path, generation: int) -> None:
    """Raise Fenced if a newer start than `generation` has begun."""
    if newest_generation(root) != generation:
        raise fenced(root, generation)


def fenced(root: Path, generation: int) -> Fenced:
    """Return what ends start `generation` once a newer one has begun."""
    return Fenced(
        f"{root} belongs to start {newest_generation(root)} of this run; this is start "
        f"{generation}, which must have been taken for dead: it stops here and writes nothing"
    )


def is_stale(root: Path, generation: int) -> bool:
    """Return whether a newer start than `generation` is known to have begun."""
    try:
        return newest_generation(root) > generation
    except OSError:  # a file server that does not answer says nothing about other starts
        return False


def newest_generation(root: Path) -> int:
    """Return the number of a run's newest start, 0 before the first."""
    path = root / "generation"
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
    except ValueError:  # the disk has altered it: the checkpoints name the starts that wrote them
        return max(map(_generation_of, checkpoints(root)), default=0)


def _generation_of(folder: Path) -> int:
    try:
        return read(folder).generation
    except ValueError:
        return 0


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves either the old or the new content."""
    beside = path.with_name(f"{path.name}.part")
    write_durably(beside, [text.encode()])
    beside.replace(path)
    sync_folder(path.parent)


def write_durably(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file part by part, hashing what it is to hold; it then has reached the disk."""
    digest, num_bytes = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in parts:
            digest.update(part)
            num_bytes += len(part)
            _write(handle, memoryview(part))
        os.fsync(handle)
    finally:
        os.close(handle)
    return FileRecord(name=path.name, num_bytes=num_bytes, sha256=digest.hexdigest())


def copy_durably(source: Path, target: Path) -> FileRecord:
    """Copy a file as write_durably() writes it."""
    with source.open("rb") as file:
        return write_durably(target, iter(lambda: file.read(2**24), b""))


def _write(handle: int, data: memoryview) -> None:
    while data:  # the kernel takes 2 GiB at most
        data = data[os.write(handle, data) :]


def sync_folder(path: Path) -> None:
    """Let the names of the files in a folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
