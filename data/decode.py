"""Decoding: the bytes of a JPEG or PNG file, or its pixels, and a geometry -> uint8 pixels.

Owns the definition of the pixels the network sees before augmentation: decode in full, cut out
the box, then resample the cut-out with an antialiased filter, so that nothing outside the box
ever shows through. Pillow decodes and resamples: its filters are what the published recipes were
trained with. What a file says of its orientation (EXIF) is ignored, as torchvision and timm do,
and four colours become three by Pillow's formula. `jpeg.py` does the same faster, and is judged by
this.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin

from data.base import DataError

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
_MAX_PIXELS = 1 << 28
_MAX_SIDE = 65_535  # the most that JPEG knows, and an index has room for
JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_READERS = ((JPEG_MAGIC, JpegImagePlugin.JpegImageFile), (PNG_MAGIC, PngImagePlugin.PngImageFile))
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = b"\xda"  # of the marker before the first pixels
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what Pillow raises


class Damaged(DataError):
    """A JPEG or PNG file that is cut off or altered, or empty."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What becomes of an image: cut out `box`, resize that to `size` (width, height), cut `window`.

    A None leaves the step out.
    """

    box: Box | None
    size: tuple[int, int]
    window: Box | None = None
    interpolation: str = "bicubic"

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what remains."""
        left, top, right, bottom = self.window or (0, 0, *self.size)
        return bottom - top, right - left


def open_image(image: bytes | NDArray[np.uint8]) -> Image.Image:
    """Return the image undecoded, its `.size` known.

    Pixels uint8 [H, W, 3] are an image too. Raises DataError if it is of neither kind or too
    large, Damaged if its header cannot be read.
    """
    if not isinstance(image, bytes):
        return Image.fromarray(image)
    for magic, reader in _READERS:
        if image.startswith(magic):
            return _checked(reader, image)
    if not image:
        raise Damaged("is empty; replace or remove the file")
    raise DataError(
        f"is neither JPEG nor PNG: {len(image)} bytes beginning {image[:8].hex(' ')}; "
        "replace or remove the file"
    )


def decode(
    image: bytes | NDArray[np.uint8], geometry: Callable[[int, int], Geometry]
) -> NDArray[np.uint8]:
    """Decode `image`, a file's bytes or pixels, to RGB pixels uint8 [H, W, 3].

    `geometry` maps the image's (width, height) to what is cut out and how it is resized. Raises
    DataError if the bytes are no JPEG or PNG file, Damaged if they are cut off or altered.
    """
    picture = open_image(image)
    plan = geometry(*picture.size)
    picture = _load(picture)
    if plan.box is not None and plan.box != (0, 0, *picture.size):
        picture = picture.crop(plan.box)
    if plan.size != picture.size:
        picture = picture.resize(plan.size, RESAMPLING[plan.interpolation])
    if plan.window is not None and plan.window != (0, 0, *picture.size):
        picture = picture.crop(plan.window)
    return np.asarray(picture)


def decode_whole(image: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return all pixels of `image`, uint8 [H, W, 3]; raises DataError as `decode` does."""
    return np.asarray(_load(open_image(image)))


def check_end(image: bytes) -> None:
    """Raise Damaged for a JPEG file without its end marker: it was cut off.

    Parts of such a one can still be decoded, and which of them are asked for differs.
    """
    if not image.startswith(JPEG_MAGIC) or image.endswith(_JPEG_END):
        return
    # Behind the end there may be padding and more, before the pixels an ended thumbnail.
    if image.rfind(_JPEG_END) < _find_scan(image):
        raise Damaged("is cut off: its end marker is missing; replace the file")


def check_whole(image: bytes) -> None:
    """Raise Damaged for a JPEG or PNG file that Pillow cannot read to its end."""
    check_end(image)
    picture = open_image(image)
    if picture.format == "JPEG":
        _load(picture)
        return
    try:
        picture.verify()
    except _FAULTS as error:
        raise _damaged(error) from error


def _find_scan(image: bytes) -> int:
    """Return where a JPEG file's header ends: before its pixels, or where it makes no sense."""
    at = 2
    while image[at : at + 1] == b"\xff" and image[at + 1 : at + 2] != _JPEG_SCAN:
        is_fill = image[at + 1 : at + 2] == b"\xff"
        at += 1 if is_fill else 2 + int.from_bytes(image[at + 2 : at + 4], "big")
    return at


def _load(picture: Image.Image) -> Image.Image:
    try:
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except _FAULTS as error:
        raise _damaged(error) from error


def _checked(reader: Callable[[io.BytesIO], Image.Image], image: bytes) -> Image.Image:
    try:
        picture = reader(io.BytesIO(image))
    except _FAULTS as error:
        raise _damaged(error) from error
    check_size(*picture.size)
    return picture


def _damaged(error: Exception) -> Damaged:
    return Damaged(f"cannot be decoded ({error}); replace the file")


def check_size(width: int, height: int) -> None:
    """Raise DataError for an image larger than any photograph: a corrupt header, or a bomb."""
    if width * height > _MAX_PIXELS or max(width, height) > _MAX_SIDE:
        raise DataError(
            f"claims {width} × {height} pixels, more than {_MAX_PIXELS} or a side above "
            f"{_MAX_SIDE}; replace or remove the file"
        )
