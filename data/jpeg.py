"""JPEG files through the C extension (data/native): many in a call, of each only what is needed.

Owns whether and how the extension is used. Invariants: its pixels are those that `decode.py`
defines, to within one step of 255; a file that it does not decode, and every file where it was
not built or fails its test, is left to `decode.py`, which also words the errors. Pixels are
resized by the same code wherever they come from, so that an image gives the same ones however it
is stored.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.base import DataError, Sample
from data.decode import (
    JPEG_MAGIC,
    Damaged,
    Geometry,
    check_end,
    check_size,
    check_whole,
    decode,
    decode_whole,
    open_image,
)

try:
    from data import _native
except ImportError:  # libjpeg-turbo or its headers were missing when the package was installed
    _built = False
else:
    _built = True

Pixels = NDArray[np.uint8]
_KERNELS = {"bilinear": 0, "bicubic": 1}


def decode_all(
    samples: Sequence[Sample],
    geometry: Callable[[int, int, int], Geometry],
    out: Pixels,
    *,
    flips: Sequence[bool] | None = None,
    reduce: bool = False,
) -> dict[int, DataError]:
    """Decode `samples` into `out` uint8 [n, H, W, 3] and return row -> error of those that fail.

    `geometry` maps a row and the image's width and height to what becomes of it; rows where
    `flips` are mirrored. With `reduce` a JPEG may be decoded at a fraction of its size where the
    result is smaller still: faster, and not quite the same pixels.
    """
    failures: dict[int, DataError] = {}
    plans: dict[int, Geometry] = {}
    fast, sizes = [], {}
    for row, sample in enumerate(samples):
        try:
            size, is_fast = _size(sample.image)
            plans[row] = geometry(row, *size)
        except DataError as error:
            failures[row] = error
            continue
        if is_fast:
            fast.append(row)
            sizes[row] = size
    mirrored = {row for row in plans if flips is not None and flips[row]}
    done = _decode_fast(samples, plans, fast, sizes, mirrored, out, reduce=reduce)
    for row, plan in plans.items():
        if row in done:
            continue
        try:
            out[row] = _decode_slowly(samples[row].image, plan, flip=row in mirrored)
        except DataError as error:
            failures[row] = error
    return failures


def check(image: bytes) -> None:
    """Raise Damaged for a JPEG or PNG file that is cut off or altered anywhere.

    What is altered and can be decoded all the same goes unnoticed: a JPEG file has no checksum.
    """
    if not image.startswith(JPEG_MAGIC) or not works():
        check_whole(image)
        return
    check_end(image)
    try:
        _native.check(image)
    except ValueError as error:
        raise Damaged(f"cannot be decoded ({error}); replace the file") from error


def build_regions(image: bytes) -> bytes | None:
    """Return an index with which parts of a JPEG file can be decoded without the others.

    None where there can be none: other formats, progressive files, no extension.
    """
    return _native.build_index(image) if works() and image.startswith(JPEG_MAGIC) else None


@cache
def works() -> bool:
    """Whether the extension is there and decodes a picture, whole and in parts, as it should."""
    if not _built:
        return False
    x, y = np.meshgrid(np.arange(90), np.arange(70))
    picture = np.stack([x * 2 + y, x * y // 25, (x - y) % 64 * 4], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=80)
    image = file.getvalue()
    plan = Geometry((37, 35, 60, 52), (23, 17))
    expected = decode(image, lambda *_: plan)
    for regions in (None, _native.build_index(image)):
        out = np.empty((1, *plan.shape, 3), np.uint8)
        jobs = np.array([_job((90, 70), plan, flip=False, reduce=False)], np.int32)
        if _native.decode([image], [regions], jobs, out) != [None] or (out[0] != expected).any():
            warnings.warn(
                "this machine's libjpeg decodes other pixels than Pillow: JPEG files are decoded "
                "by Pillow, which is slower",
                stacklevel=2,
            )
            return False
    return True


def _size(image: bytes | Pixels) -> tuple[tuple[int, int], bool]:
    """Return width and height, and whether the extension may decode, or resize, the image."""
    if not isinstance(image, bytes):
        return (image.shape[1], image.shape[0]), works()
    check_end(image)
    if image.startswith(JPEG_MAGIC) and works():
        with suppress(ValueError):  # Pillow has the last word
            size = _native.size(image)
            check_size(*size)
            return size, True
    return open_image(image).size, False


def _decode_fast(
    samples: Sequence[Sample],
    plans: dict[int, Geometry],
    rows: list[int],
    sizes: dict[int, tuple[int, int]],
    mirrored: set[int],
    out: Pixels,
    *,
    reduce: bool,
) -> set[int]:
    """Decode `rows` in one call and return those that succeeded."""
    if not rows:
        return set()
    jobs = [_job(sizes[row], plans[row], flip=row in mirrored, reduce=reduce) for row in rows]
    target = out if len(rows) == len(out) else np.empty((len(rows), *out.shape[1:]), np.uint8)
    answers = _native.decode(
        [samples[row].image for row in rows],
        [samples[row].regions for row in rows],
        np.array(jobs, np.int32),
        target,
    )
    if target is not out:
        out[rows] = target
    return {row for row, answer in zip(rows, answers, strict=True) if answer is None}


def _decode_slowly(image: bytes | Pixels, plan: Geometry, *, flip: bool) -> Pixels:
    """Decode with Pillow, and resize as the extension does where there is one."""
    if not works():
        pixels = decode(image, lambda *_: plan)
        return pixels[:, ::-1] if flip else pixels
    pixels = decode_whole(image)
    out = np.empty((*plan.shape, 3), np.uint8)
    job = _job((pixels.shape[1], pixels.shape[0]), plan, flip=flip, reduce=False)
    _native.decode([pixels], [None], np.array([job], np.int32), out[None])
    return out


def _job(size: tuple[int, int], plan: Geometry, *, flip: bool, reduce: bool) -> list[int]:
    """Spell a plan as the extension wants it."""
    box = plan.box or (0, 0, *size)
    window = plan.window or (0, 0, *plan.size)
    kernel = _KERNELS[plan.interpolation]
    return [*size, *box, *plan.size, *window, kernel, int(flip), int(reduce)]
