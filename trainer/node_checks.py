"""Checks of a node as a whole: versions, memory, limits of the system, and the folders of a run."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import torch

from models.base import Backbone
from models.registry import build

from .config import RunConfig
from .manifest import sync_folder
from .readings import Reading, failed
from .sections import ModelConfig

_GIB = 2**30
_PACKAGES = ("launcher", "trainer", "models", "data")
_CHUNK = 2**20
_CHUNKS = 32  # of a test file
_SLOWEST_RENAME = 1000.0  # milliseconds
_SHM_GIB = 0.5  # of /dev/shm: what NCCL takes for eight GPUs, and containers often lack
_OPEN_FILES = 4096.0  # a socket per peer and thread, the shards and the logs
_LOCKED_GIB = 1.0  # of memory that InfiniBand's buffers are locked in


def sketch(config: ModelConfig) -> Backbone:
    """Return the network without weights, to read its shapes.

    Raises:
        ModelError: if the model does not exist or cannot take these settings.
    """
    with torch.device("meta"):
        return build(**asdict(config))


def checkpoint_bytes(model: Backbone, *, ema: bool) -> int:
    """Return about how large a checkpoint is: fp32 weights, two moments, and an average if kept."""
    copies = 4 if ema else 3
    return 4 * copies * sum(parameter.numel() for parameter in model.parameters())


def versions() -> Iterator[Reading]:
    """What has to be the same everywhere."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "code": _code_hash(Path(__file__).resolve().parents[1]),
    }
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for name, version in found.items():
        yield Reading(check=name, value=version, better="same")


def _code_hash(home: Path) -> str:
    """Return a short hash of the Python files of the packages in `home`."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((home / package).rglob("*.py")):
            digest.update(str(path.relative_to(home)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def machine() -> Iterator[Reading]:
    """Cores, memory, shared memory and limits."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    yield Reading(check="cores", value=str(cores), better="same", worst="warn")
    yield Reading(
        check="free memory", value=memory.available / _GIB, unit="GiB", share=0.5, worst="warn"
    )
    shm = shutil.disk_usage("/dev/shm").free / _GIB
    yield Reading(check="/dev/shm", value=shm, unit="GiB", limit=_SHM_GIB, worst="warn")
    files = _soft_limit(resource.RLIMIT_NOFILE, ceiling=2.0**30)
    yield Reading(check="open files", value=files, limit=_OPEN_FILES, worst="warn")
    if Path("/sys/class/infiniband").is_dir():
        locked = _soft_limit(resource.RLIMIT_MEMLOCK, ceiling=float(memory.total)) / _GIB
        yield Reading(
            check="locked memory", value=locked, unit="GiB", limit=_LOCKED_GIB, worst="warn"
        )


def _soft_limit(kind: int, *, ceiling: float) -> float:
    soft, _ = resource.getrlimit(kind)
    return ceiling if soft == resource.RLIM_INFINITY else min(float(soft), ceiling)


def folders(config: RunConfig, checkpoint: int) -> Iterator[Reading]:
    """Write, read and rename in the places of a run; `checkpoint` is the size of one in bytes."""
    yield from _folder("run folder", Path(config.run_dir), need=checkpoint)
    if config.checkpoint.local_dir is not None:
        # Each process of the node leaves its part there: all of it, where there is one node.
        yield from _folder("local_dir", Path(config.checkpoint.local_dir), need=checkpoint)
    if config.data.cache_dir is not None:
        yield from _folder("cache_dir", Path(config.data.cache_dir), need=0)


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists already."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _folder(name: str, folder: Path, *, need: int) -> Iterator[Reading]:
    try:
        place = existing(folder)
        free = shutil.disk_usage(place).free / _GIB
        yield Reading(check=f"space in {name}", value=free, unit="GiB", limit=need / _GIB)
        seconds = _write_and_read(place)
    except (OSError, RuntimeError) as error:
        yield failed(name, error)
        return
    mib = _CHUNKS * _CHUNK / 2**20
    for what in ("write", "read"):
        # File servers serve all nodes at once, so that equal nodes may differ a lot.
        yield Reading(
            check=f"{what} in {name}", value=mib / seconds[what], unit="MiB/s", share=0.8,
            worst="warn",
        )  # fmt: skip
    yield Reading(
        check=f"rename in {name}", value=1000 * seconds["rename"], unit="ms", better="low",
        limit=_SLOWEST_RENAME, worst="warn",
    )  # fmt: skip


def _write_and_read(folder: Path) -> dict[str, float]:
    """Return the seconds in which a file is written to the disk, renamed and read back.

    Raises:
        OSError: if one of them fails.
        RuntimeError: if other bytes come back.
    """
    chunk = os.urandom(_CHUNK)
    beside = folder / f".preflight_{uuid.uuid4().hex}"
    path = beside.with_suffix(".whole")
    try:
        marks = [time.perf_counter()]
        with beside.open("wb") as file:
            for _ in range(_CHUNKS):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            # Out of this machine's memory, so that reading asks the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        marks.append(time.perf_counter())
        beside.rename(path)
        sync_folder(folder)
        marks.append(time.perf_counter())
        with path.open("rb") as file:
            same = all(file.read(_CHUNK) == chunk for _ in range(_CHUNKS))
        marks.append(time.perf_counter())
    finally:
        beside.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if not same:
        raise RuntimeError(f"{folder}: other bytes are read than were written")
    spans = (end - begin for begin, end in pairwise(marks))
    return dict(zip(("write", "rename", "read"), spans, strict=True))
