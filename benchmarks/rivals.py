"""Other ways from JPEG files to random resized crops of uint8 pixels, for decode.py.

Each function prepares a rival and returns what does one image or a whole pass; it raises
ImportError where its package is missing. Where a rival's interface takes a crop it gets ours,
ready made; the others draw their own, of the same distribution. All use one thread.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.decode import Box

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Crop:
    """What becomes of an image: the part cut out, and whether it is mirrored."""

    box: Box
    flip: bool


@dataclass(frozen=True)
class Work:
    """The files, how many go into a batch, and the side of the square that each ends as."""

    images: list[bytes]
    batch: int
    size: int


One = Callable[[int, Crop], Pixels]  # image `row` -> pixels [size, size, 3]
Whole = Callable[[], Pixels]  # all images in batches of its own crops -> the last batch


def torchvision_tensor(work: Work) -> One:
    """torchvision's own decoder, then its antialiased bicubic crop on tensors."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import InterpolationMode, functional

    files = [torch.from_numpy(np.frombuffer(image, np.uint8).copy()) for image in work.images]

    def one(row: int, crop: Crop) -> Pixels:
        left, top, right, bottom = crop.box
        pixels = functional.resized_crop(
            decode_jpeg(files[row], mode=ImageReadMode.RGB),
            *(top, left, bottom - top, right - left),
            size=[work.size, work.size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        pixels = functional.horizontal_flip(pixels) if crop.flip else pixels
        result: Pixels = pixels.permute(1, 2, 0).numpy()
        return result

    return one


def pillow(work: Work) -> One:
    """Pillow with torchvision's functions for it: what its PIL transforms call."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    def one(row: int, crop: Crop) -> Pixels:
        left, top, right, bottom = crop.box
        picture = F.resized_crop(
            Image.open(io.BytesIO(work.images[row])).convert("RGB"),
            *(top, left, bottom - top, right - left),
            size=[work.size, work.size],
            interpolation=InterpolationMode.BICUBIC,
        )
        return np.asarray(F.hflip(picture) if crop.flip else picture)

    return one


def timm_transform(work: Work) -> One:
    """timm's training transform as its scripts use it: uint8 out, normalised on the device."""
    from timm.data.transforms_factory import create_transform

    transform = create_transform(
        work.size,
        is_training=True,
        use_prefetcher=True,
        color_jitter=None,
        interpolation="bicubic",
    )

    def one(row: int, crop: Crop) -> Pixels:
        del crop  # it draws its own
        pixels = transform(Image.open(io.BytesIO(work.images[row])).convert("RGB"))
        return np.asarray(pixels).transpose(1, 2, 0)

    return one


def opencv(work: Work) -> One:
    """OpenCV, its filter for shrinking: an average over areas."""
    import cv2

    cv2.setNumThreads(1)

    def one(row: int, crop: Crop) -> Pixels:
        left, top, right, bottom = crop.box
        picture = cv2.imdecode(np.frombuffer(work.images[row], np.uint8), cv2.IMREAD_COLOR)
        side = (work.size, work.size)
        picture = cv2.resize(picture[top:bottom, left:right], side, interpolation=cv2.INTER_AREA)
        picture = cv2.flip(picture, 1) if crop.flip else picture
        result: Pixels = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        return result

    return one


def ffcv_jpeg(work: Work) -> Whole:
    """FFCV's loader over a .beton file that holds the very same JPEG files."""
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip
    from ffcv.writer import DatasetWriter

    field = RGBImageField(write_mode="jpg")

    def keep(destination: Any, image: bytes, malloc: Callable[[int], Any]) -> None:
        """Store the file where FFCV's own method would encode pixels."""
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["width"], destination["height"] = Image.open(io.BytesIO(image)).size
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, np.uint8)

    field.encode = keep
    folder = tempfile.TemporaryDirectory()
    path = str(Path(folder.name) / "tiles.beton")
    files = [(image,) for image in work.images]
    DatasetWriter(path, {"image": field}, num_workers=1).from_indexed_dataset(files)
    decoder = RandomResizedCropRGBImageDecoder((work.size, work.size))
    loader = Loader(
        path,
        batch_size=work.batch,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [decoder, RandomHorizontalFlip()]},
    )

    def whole() -> Pixels:
        assert folder.name, "kept until nobody can call this any more"
        for (batch,) in loader:
            last = batch
        return np.array(last)

    return whole


def dali(work: Work, filter: str) -> Whole:
    """NVIDIA DALI on the CPU: decoding of a random part, antialiased resizing."""
    from nvidia.dali import fn, pipeline_def, types

    def batches() -> Iterator[list[Pixels]]:
        files = [np.frombuffer(image, np.uint8) for image in work.images]
        while True:
            for start in range(0, len(files), work.batch):
                yield files[start : start + work.batch]

    @pipeline_def(
        batch_size=work.batch, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False
    )
    def pipeline() -> Any:
        files = fn.external_source(batches(), dtype=types.UINT8, batch=True)
        part = fn.decoders.image_random_crop(
            files, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
        )
        size = [work.size, work.size]
        pixels = fn.resize(part, size=size, interp_type=getattr(types, filter), antialias=True)
        return fn.flip(pixels, horizontal=fn.random.coin_flip())

    graph = pipeline()
    graph.build()

    def whole() -> Pixels:
        for _ in range(0, len(work.images), work.batch):
            (last,) = graph.run()
        result: Pixels = last.as_array()
        return result

    return whole


def each(one: One, rows: Sequence[int], crops: Sequence[Crop]) -> Pixels:
    """Do `rows` one after the other and return them all."""
    return np.stack([one(row, crops[row]) for row in rows])
