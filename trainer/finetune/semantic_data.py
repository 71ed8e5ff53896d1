"""Folders of pictures whose pixels have classes, and datasets over them.

A label picture holds a class index for each pixel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..config import UserError
from .heads.semantic import IGNORED
from .semantic_augment import Augmentation, augment

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@dataclass(frozen=True)
class LabelledPicture:
    """An image file, the PNG file of its labels, and the name that both share."""

    name: str
    image: Path
    labels: Path


@dataclass(frozen=True, kw_only=True)
class SemanticFolder:
    """Pictures by name, and the names of the classes.

    With `zero_is_other`, as in ADE20K, files hold 0 for what belongs to no class and k + 1 for
    class k; otherwise k. 255 is ignored in both.
    """

    pictures: tuple[LabelledPicture, ...]
    classes: tuple[str, ...]
    zero_is_other: bool = False

    def check(self, count: int = 64) -> None:
        """Read `count` pictures from all over the folder, to find mistakes before training.

        Raises:
            UserError: for the first picture that cannot be trained on.
        """
        places = np.linspace(0, len(self.pictures) - 1, min(count, len(self.pictures)))
        for index in np.unique(places.round()).astype(int):
            self.read(int(index))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image `index` as uint8 [3, H, W], and its labels as uint8 [H, W].

        Raises:
            UserError: if a file is damaged, they differ in size, or a label has no class.
        """
        picture = self.pictures[index]
        pixels = _pixels(picture.image)
        labels = self._labels(picture.labels)
        if labels.shape != pixels.shape[:2]:
            (height, width), (rows, columns) = pixels.shape[:2], labels.shape
            raise UserError(
                f"{picture.image} has {width} x {height} pixels and {picture.labels} labels "
                f"{columns} x {rows}: make the labels for the picture as it is"
            )
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return image, torch.from_numpy(labels)

    def _labels(self, path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        with _opened(path) as file:
            if file.mode not in ("1", "L", "P", "I", "I;16"):
                raise UserError(
                    f"{path} is a picture of mode {file.mode}: labels are PNG files with one "
                    "channel that holds the class of each pixel"
                )
            values = np.asarray(file).astype(np.int64)
        lowest = int(self.zero_is_other)
        wrong = (values != IGNORED) & (values >= lowest + len(self.classes))
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            raise UserError(
                f"{path} has label {values[row, column]} in row {row}, column {column}, and the "
                f"{len(self.classes)} classes are {lowest} to {lowest + len(self.classes) - 1}, "
                f"with {IGNORED} for what is ignored: mend the file, or name the class"
            )
        if self.zero_is_other:
            values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
        return values.astype(np.uint8)


def ade20k(folder: Path, split: Literal["training", "validation"]) -> SemanticFolder:
    """Return a split of ADE20K as the scene parsing challenge has it (ADEChallengeData2016).

    Raises:
        UserError: if the folder does not have that form.
    """
    return SemanticFolder(
        pictures=_matched(folder / "images" / split, folder / "annotations" / split),
        classes=_ade20k_classes(folder),
        zero_is_other=True,
    )


def index_folder(images: Path, labels: Path, classes: Path) -> SemanticFolder:
    """Return the pictures in `images` with the PNG files of the same names in `labels`.

    `classes` names the classes, from 0 on: a JSON list, or a text file with one in each line.

    Raises:
        UserError: if there are no pictures, one has no labels, or there are no names.
    """
    return SemanticFolder(pictures=_matched(images, labels), classes=_read_classes(classes))


class SemanticViews:
    """The training samples of a folder: augmented crops, float32 [3, H, W] in 0..1, and labels.

    What is drawn comes from torch's generator.
    """

    def __init__(self, folder: SemanticFolder, augmentation: Augmentation) -> None:
        self.folder = folder
        self.augmentation = augmentation

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.folder.pictures)

    def view(self, index: int) -> tuple[Tensor, Tensor]:
        """Return picture `index` and its labels, int64 [H, W], as torch's generator has it seen."""
        image, labels = augment(*self.folder.read(index), self.augmentation)
        return image.float() / 255, labels.long()


def _matched(images: Path, labels: Path) -> tuple[LabelledPicture, ...]:
    """Return the pictures below `images` in order of their names, with labels below `labels`."""
    for folder in (images, labels):
        if not folder.is_dir():
            raise UserError(
                f"{folder} is no folder: ADE20K has images/ and annotations/, each with training/ "
                "and validation/; elsewhere name the folders of images and of labels"
            )
    files = [path for path in images.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES]
    if not files:
        raise UserError(f"{images} holds no pictures ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    known = {path.relative_to(labels).with_suffix("").as_posix() for path in labels.rglob("*.png")}
    pictures: dict[str, LabelledPicture] = {}
    for path in sorted(files):
        name = path.relative_to(images).with_suffix("").as_posix()
        if name in pictures:
            raise UserError(f"{pictures[name].image} and {path} share one name: rename one of them")
        pictures[name] = LabelledPicture(name, path, labels / f"{name}.png")
    missing = [name for name in pictures if name not in known]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(pictures)} pictures in {images} have no labels, such as "
            f"{pictures[missing[0]].labels}: add the files, or take the pictures out"
        )
    return tuple(pictures[name] for name in sorted(pictures))


def _ade20k_classes(folder: Path) -> tuple[str, ...]:
    """Return the names in the table that the data set comes with, or numbers where it is gone."""
    table = folder / "objectInfo150.txt"
    if not table.exists():
        return tuple(f"class {number}" for number in range(1, 151))
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:] if line.strip()]
    return tuple(row[-1].split(",")[0].strip() for row in rows)


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"the classes cannot be read from {path} ({error})") from None
    named = isinstance(found, list) and all(isinstance(name, str) for name in found)
    names: Sequence[str] = [name.strip() for name in found if name.strip()] if named else []
    if not 1 <= len(names) <= IGNORED:
        raise UserError(
            f"{path} names {len(names)} classes: it must be a JSON list of strings, or text with a "
            f"name in each line, and hold 1 to {IGNORED}"
        )
    return tuple(names)


def _pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return an image as uint8 [H, W, 3], the way up that its camera says."""
    with _opened(path) as file:
        return np.array(ImageOps.exif_transpose(file).convert("RGB"))


def _opened(path: Path) -> Image.Image:
    """Return a picture whose pixels are read.

    Raises:
        UserError: if the file is damaged, or no picture.
    """
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken files
        raise UserError(
            f"{path} cannot be read ({error}): replace it, or take the picture and its labels out"
        ) from None
    return picture
