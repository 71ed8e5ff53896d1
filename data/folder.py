"""Sources without shards: a folder of images per class, and images made up on the spot."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.base import DataError, Sample
from data.decode import IMAGE_SUFFIXES
from data.randomness import Purpose, uniforms


class _AtHand(Sized):
    """What sources have in common that read nothing from end to end."""

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """All samples count as one shard."""
        return np.array([len(self)], np.int64)

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """Nothing needs to be fetched."""

    def prefetch(self, ids: Sequence[int]) -> None:
        """Nothing needs to be fetched."""

    def close(self) -> None:
        """Nothing was begun."""


class FolderSource(_AtHand):
    """The `Source` over `folder`/CLASS/**/IMAGE, as ImageNet is laid out.

    Classes and files are in the order of their names, hidden ones left out. The fingerprint covers
    names and sizes, not contents: pack the folder into shards for that. Raises DataError if there
    are no images, or a folder cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise DataError(f"{self._folder} is no folder; name one that holds a folder per class")
        try:
            entries = sorted(path for path in self._folder.iterdir() if _is_class(path))
        except OSError as error:
            raise _unreadable(error) from error
        self.classes = tuple(path.name for path in entries)
        self._files: list[Path] = []
        labels: list[int] = []
        for label, entry in enumerate(entries):
            found = _images_below(entry)
            self._files += found
            labels += [label] * len(found)
        if not self._files:
            raise DataError(
                f"{self._folder} holds no CLASS/*.jpg or *.png; name another folder, sort its "
                "images into one folder per class, or index it if it holds shards: `foveate data "
                "index`"
            )
        self.labels: NDArray[np.int64] = np.array(labels, np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes of all files."""
        digest = hashlib.sha256()
        try:
            for path in self._files:
                line = f"{path.relative_to(self._folder).as_posix()}\0{path.stat().st_size}\n"
                digest.update(line.encode())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}); restore it") from error
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, id: int) -> Sample:
        """Return sample `id`; raises DataError naming the file if it cannot be read."""
        try:
            image = self._files[id].read_bytes()
        except OSError as error:
            raise DataError(f"{self.name(id)} cannot be read ({error}); restore it") from error
        return Sample(id=id, image=image, label=int(self.labels[id]))

    def name(self, id: int) -> str:
        """Return the file's path."""
        return str(self._files[id])


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource(_AtHand):
    """A `Source` over pixels in memory: `images` uint8 [n, H, W, 3], `labels` int64 [n]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over pixels, labels and class names."""
        digest = hashlib.sha256(self.images.tobytes())
        digest.update(self.labels.tobytes())
        digest.update("\0".join(self.classes).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, id: int) -> Sample:
        """Return sample `id` as a PNG file."""
        return Sample(id=id, image=encode_png(self.images[id]), label=int(self.labels[id]))

    def name(self, id: int) -> str:
        """Return `array sample ID`."""
        return f"array sample {id}"


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(_AtHand):
    """A `Source` of coloured noise in PNG files, made from the sample's number.

    Every class has a colour of its own, so that a network can learn to tell them apart. `size`
    is the width and height in pixels.
    """

    num_samples: int = 256
    num_classes: int = 10
    size: int = 32
    seed: int = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters, which say all."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def classes(self) -> tuple[str, ...]:
        """`class_0`, `class_1`, …"""
        return tuple(f"class_{label}" for label in range(self.num_classes))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels 0, 1, 2, … in turn, shape [num_samples]."""
        return np.arange(self.num_samples, dtype=np.int64) % self.num_classes

    def __len__(self) -> int:
        return self.num_samples

    def read(self, id: int) -> Sample:
        """Return sample `id`, encoded."""
        label = int(self.labels[id])
        color = uniforms(self.seed, 0, label, Purpose.SYNTHETIC, count=3)
        noise = uniforms(self.seed, 1, id, Purpose.SYNTHETIC, count=3 * self.size**2)
        pixels = 255 * (0.7 * color + 0.3 * noise.reshape(self.size, self.size, 3))
        return Sample(id=id, image=encode_png(pixels.astype(np.uint8)), label=label)

    def name(self, id: int) -> str:
        """Return `synthetic sample ID`."""
        return f"synthetic sample {id}"


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return uint8 [H, W, 3] as the bytes of a PNG file: lossless."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _images_below(folder: Path) -> list[Path]:
    """Return the images in a folder and its folders, in the order of their paths."""

    def fail(error: OSError) -> None:
        raise _unreadable(error) from error

    files = (
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=fail)
        for name in names
        if not name.startswith(".")
    )
    return sorted(path for path in files if _is_image(path))


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read ({error.strerror}); make it readable")


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and path.is_file()
