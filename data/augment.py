"""Per-sample transforms: what each image goes through on its way to the network.

Owns crop, flip and the evaluation geometry; the policies are in `policy.py`, and what is done to
colours alone, on the device, in `color.py`.
Invariant: a training view is a pure function of (spec, seed, epoch, key, bytes), where the key
tells samples and their copies apart: random numbers are derived in advance for many samples at
once and handed down row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.base import DataError, Sample
from data.decode import RESAMPLING, Box, Geometry
from data.jpeg import decode_all
from data.operations import Canvas
from data.policy import parse_policy
from data.randomness import Purpose, uniforms

_CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class AugmentSpec:
    """The training transform.

    A crop of `scale` × the image's area and aspect `ratio` is resized to `size` × `size` pixels
    (Szegedy et al., arXiv:1409.4842), flipped with probability `hflip`, then goes through
    `auto_augment`, a policy as timm spells them (`rand-m9-mstd0.5-inc1`, `v0`, `augmix-m3`).
    `interpolation` is bilinear, bicubic, or random (one of the two per image, and per operation of
    the policy). With `dct_scaling` a JPEG may be decoded at a fraction of its size where the result
    is smaller still: faster, and not quite the same pixels. What geometric operations uncover gets
    the colour `mean`, that of pixels scaled to [0, 1]. `sizes` are (first epoch, size) pairs that
    take the place of `size` where it changes on the way (progressive resolution: Tan and Le,
    arXiv:2104.00298).
    """

    size: int = 224
    sizes: tuple[tuple[int, int], ...] = ()
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    dct_scaling: bool = False
    hflip: float = 0.5
    auto_augment: str | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)

    def __post_init__(self) -> None:
        if self.interpolation not in ("random", *RESAMPLING):
            known = ", ".join(("random", *RESAMPLING))
            raise DataError(f"interpolation {self.interpolation!r} is not one of {known}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise DataError(f"crop scale {self.scale} must rise within (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(f"crop ratio {self.ratio} must rise from above 0")
        if self.auto_augment is not None:
            parse_policy(self.auto_augment)

    def size_at(self, epoch: int) -> int:
        """Return the width and height of views in `epoch`, in pixels."""
        begun = [size for first, size in self.sizes if first <= epoch]
        return begun[-1] if begun else self.size

    def render(
        self,
        samples: Sequence[Sample],
        keys: NDArray[np.int64],
        out: NDArray[np.uint8],
        *,
        seed: int,
        epoch: int,
    ) -> dict[int, DataError]:
        """Write the training view of each sample to `out` uint8 [n, size, size, 3].

        The size is `size_at(epoch)`. `keys` int64 [n] are the sample ids, or what tells copies of a
        sample apart. Returns row -> error of the images that cannot be decoded.
        """
        crops = self._crop_draws(keys, seed=seed, epoch=epoch)
        flips = uniforms(seed, epoch, keys, Purpose.FLIP, count=1)[:, 0] < self.hflip
        geometry = partial(self._geometry, crops, self.size_at(epoch))
        failures = decode_all(samples, geometry, out, flips=flips.tolist(), reduce=self.dct_scaling)
        if self.auto_augment is not None:
            policy, canvas = parse_policy(self.auto_augment), self._canvas()
            draws = uniforms(seed, epoch, keys, Purpose.AUTO_AUGMENT, count=policy.num_draws)
            for row in range(len(samples)):
                if row not in failures:
                    picture = Image.fromarray(out[row])
                    out[row] = np.asarray(policy.apply(picture, draws[row], canvas))
        return failures

    def _crop_draws(self, keys: NDArray[np.int64], *, seed: int, epoch: int) -> list[list[float]]:
        """Return, for each key, ten areas, ten aspect ratios, and three uniform numbers."""
        draws = uniforms(seed, epoch, keys, Purpose.CROP, count=2 * _CROP_ATTEMPTS + 3)
        areas, ratios = draws[:, :_CROP_ATTEMPTS], draws[:, _CROP_ATTEMPTS:-3]
        areas[:] = self.scale[0] + areas * (self.scale[1] - self.scale[0])
        ratios[:] = self.ratio[0] * np.exp(ratios * math.log(self.ratio[1] / self.ratio[0]))
        rows: list[list[float]] = draws.tolist()
        return rows

    def _geometry(
        self, crops: list[list[float]], size: int, row: int, width: int, height: int
    ) -> Geometry:
        draws, interpolation = crops[row], self.interpolation
        if interpolation == "random":
            interpolation = "bilinear" if draws[-1] < 0.5 else "bicubic"
        areas, ratios = draws[:_CROP_ATTEMPTS], draws[_CROP_ATTEMPTS:-3]
        box = crop_box(areas, ratios, (draws[-3], draws[-2]), (width, height), limits=self.ratio)
        return Geometry(box, (size, size), interpolation=interpolation)

    def _canvas(self) -> Canvas:
        names = tuple(RESAMPLING) if self.interpolation == "random" else (self.interpolation,)
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        return Canvas(resample=tuple(RESAMPLING[name] for name in names), fill=(red, green, blue))


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """The evaluation transform, without any randomness.

    The shorter side is resized to `size` / `crop_pct`, bicubically, and the centre cut out; with
    `squash` the whole image is warped to the square instead (as for sizes from 384 up). At
    crop_pct 1 an image that has the right size already is left as it is.
    """

    size: int = 224
    crop_pct: float = 0.875
    squash: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct {self.crop_pct} must lie in (0, 1]")

    def render(self, samples: Sequence[Sample], out: NDArray[np.uint8]) -> dict[int, DataError]:
        """Write the evaluation view of each sample to `out` uint8 [n, size, size, 3].

        Returns row -> error of the images that cannot be decoded.
        """
        return decode_all(samples, self._geometry, out)

    def _geometry(self, row: int, width: int, height: int) -> Geometry:
        if self.squash:
            return Geometry(None, (self.size, self.size))
        short = math.floor(self.size / self.crop_pct)
        if width <= height:
            resized = (short, int(short * height / width))
        else:
            resized = (int(short * width / height), short)
        left, top = (round((side - self.size) / 2) for side in resized)
        window = (left, top, left + self.size, top + self.size)
        return Geometry(None, resized, window)


def crop_box(
    areas: Sequence[float],
    ratios: Sequence[float],
    place: tuple[float, float],
    size: tuple[int, int],
    *,
    limits: tuple[float, float],
) -> Box:
    """Return the random crop of an image of `size` (width, height), as torchvision defines it.

    The first (area as a share of the image, aspect ratio) that fits is taken, at `place`, two
    uniform numbers; if none fits, the largest centred crop whose aspect lies within `limits`.
    """
    width, height = size
    for area, ratio in zip(areas, ratios, strict=True):
        crop_width = round(math.sqrt(area * width * height * ratio))
        crop_height = round(math.sqrt(area * width * height / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(place[0] * (width - crop_width + 1))
            top = int(place[1] * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    return _centre_box(width, height, limits)


def _centre_box(width: int, height: int, limits: tuple[float, float]) -> Box:
    crop_width, crop_height = width, height
    if width / height < limits[0]:
        crop_height = round(width / limits[0])
    elif width / height > limits[1]:
        crop_width = round(height * limits[1])
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
