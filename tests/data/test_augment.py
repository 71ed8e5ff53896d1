"""Decoding, cropping and resizing against torchvision and timm, on a made-up photograph."""

import io
import random
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import functional as F2

from data.augment import AugmentSpec, EvalSpec, crop_box
from data.base import DataError
from data.decode import Geometry, decode
from tests.data.pictures import as_samples, encode, photograph

PHOTO = encode(photograph(), "JPEG", quality=92)
BOXES = [(0, 0, 500, 375), (33, 20, 401, 333), (100, 50, 150, 290), (480, 360, 500, 375)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_and_resize_equal_torchvision(box, interpolation):
    left, top, right, bottom = box
    ours = decode(PHOTO, lambda *_: Geometry(box, (224, 224), interpolation=interpolation))
    args = (top, left, bottom - top, right - left, [224, 224], InterpolationMode(interpolation))
    picture = Image.open(io.BytesIO(PHOTO)).convert("RGB")
    assert np.array_equal(ours, np.asarray(F.resized_crop(picture, *args)))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    tensor = F2.resized_crop(pixels, *args, antialias=True).permute(1, 2, 0).numpy()
    difference = np.abs(ours.astype(int) - tensor.astype(int))
    assert (difference <= 1).mean() > 0.999
    assert difference.max() <= 3


def evaluation_view(spec, image):
    out = np.empty((1, spec.size, spec.size, 3), np.uint8)
    assert spec.render(as_samples([image]), out) == {}
    return out[0]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (640, 230)])
@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        (EvalSpec(), "center"),
        (EvalSpec(crop_pct=0.95), "center"),
        (EvalSpec(size=384, crop_pct=1.0, squash=True), "squash"),
    ],
)
def test_evaluation_views_equal_timm(size, spec, mode):
    picture = photograph(*size)
    transform = create_transform(
        spec.size,
        is_training=False,
        interpolation="bicubic",
        crop_pct=spec.crop_pct,
        crop_mode=mode,
        normalize=False,
    )
    expected = transform(picture).permute(1, 2, 0).numpy()
    image = encode(picture, "PNG")
    assert np.array_equal(decode(image, lambda *size: spec._geometry(0, *size)), expected)
    difference = np.abs(evaluation_view(spec, image).astype(int) - expected)
    # The extension's resize is within a step of exact arithmetic, Pillow's not everywhere.
    assert (difference <= 1).mean() > 0.998
    assert difference.max() <= 4


def test_small_images_at_native_size_are_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = encode(Image.fromarray(pixels), "PNG")
    assert np.array_equal(evaluation_view(EvalSpec(size=32, crop_pct=1.0), image), pixels)


@pytest.mark.parametrize("published", [RandomResizedCrop, RandomResizedCropAndInterpolation])
def test_crops_are_distributed_like_torchvisions_and_timms(published):
    scale, ratio, count = (0.08, 1.0), (3 / 4, 4 / 3), 4000
    spec = AugmentSpec(scale=scale, ratio=ratio)
    rows = spec._crop_draws(np.arange(count), seed=0, epoch=0)
    boxes = np.array([spec._geometry(rows, spec.size, row, 500, 333).box for row in range(count)])
    torch.manual_seed(0)
    random.seed(0)
    blank = Image.new("RGB", (500, 333))
    theirs = np.array([published.get_params(blank, scale, ratio) for _ in range(count)])
    theirs = theirs[:, [1, 0, 3, 2]]  # left, top, width, height
    ours = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    assert ours[:, :2].min() >= 0
    assert boxes[:, 2].max() <= 500
    assert boxes[:, 3].max() <= 333
    for first, second in zip(ours.T, theirs.T, strict=True):
        merged = np.concatenate([first, second])
        shares = [np.searchsorted(np.sort(values), merged, "right") for values in (first, second)]
        assert np.abs(shares[0] - shares[1]).max() / count < 1.95 * (2 / count) ** 0.5


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 10), (493, 0, 506, 10)), ((9, 900), (0, 444, 9, 456)), ((50, 50), (0, 0, 50, 50))],
)
def test_an_image_that_no_crop_fits_gets_the_largest_centred_one(size, expected):
    assert crop_box([2.0] * 10, [1.0] * 10, (0.5, 0.5), size, limits=(3 / 4, 4 / 3)) == expected


def views(spec, ids, *, image=PHOTO, seed=1, epoch=0):
    out = np.empty((len(ids), spec.size, spec.size, 3), np.uint8)
    samples = as_samples([image] * len(ids))
    assert spec.render(samples, np.array(ids), out, seed=seed, epoch=epoch) == {}
    return out


@pytest.mark.parametrize(
    "spec",
    [
        AugmentSpec(size=24),
        AugmentSpec(size=24, interpolation="random", auto_augment="v0-mstd0.5"),
        AugmentSpec(size=24, auto_augment="rand-m9-mstd0.5-inc1"),
        AugmentSpec(size=24, auto_augment="augmix-m5"),
    ],
)
def test_a_view_depends_on_seed_epoch_and_id_alone(spec):
    together = views(spec, [5, 6, 7, 8])
    assert together.shape == (4, 24, 24, 3)
    assert together.dtype == np.uint8
    assert np.array_equal(together[[3, 1]], views(spec, [8, 6]))
    assert not np.array_equal(together[0], views(spec, [5], epoch=1)[0])
    assert not np.array_equal(together[0], views(spec, [5], seed=2)[0])
    assert not np.array_equal(together[0], together[1])


def test_what_warping_uncovers_has_the_mean_colour():
    black = encode(Image.new("RGB", (32, 32)), "PNG")
    spec = AugmentSpec(size=32, auto_augment="rand-m10-n1-p1", mean=(0.2, 0.4, 0.6))
    colors = set(map(tuple, views(spec, range(60), image=black).reshape(-1, 3).tolist()))
    assert (51, 102, 153) in colors
    assert (124, 116, 104) not in colors


def test_half_of_the_views_are_mirrored():
    whole = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3), "size": 16}
    plain = views(AugmentSpec(hflip=0.0, **whole), [0])[0]
    assert np.array_equal(views(AugmentSpec(hflip=1.0, **whole), [0])[0], plain[:, ::-1])
    mirrored = views(AugmentSpec(hflip=0.5, **whole), range(200)) == plain[:, ::-1]
    assert 70 < mirrored.all(axis=(1, 2, 3)).sum() < 130


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_policy_resamples_as_the_crop_does(interpolation):
    whole = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3), "size": 64, "hflip": 0.0}
    image = encode(photograph(64, 48), "PNG")

    def warped(interpolation):
        spec = AugmentSpec(auto_augment="rand-p1-n1", interpolation=interpolation, **whole)
        return views(spec, range(60), image=image)

    mixed, expected = warped("random"), warped(interpolation)
    same = (mixed == expected).all(axis=(1, 2, 3))
    assert same.any()
    assert not same.all()


@pytest.mark.parametrize(
    "image",
    [
        encode(photograph(40, 30).convert("L"), "JPEG"),
        encode(photograph(40, 30).convert("CMYK"), "JPEG"),
        encode(photograph(40, 30).convert("P"), "PNG"),
        encode(photograph(40, 30).convert("RGBA"), "PNG"),
        encode(photograph(40, 30), "JPEG", progressive=True),
    ],
    ids=["grey", "cmyk", "palette", "alpha", "progressive"],
)
def test_every_kind_of_jpeg_and_png_becomes_rgb(image):
    pixels = decode(image, lambda width, height: Geometry(None, (width, height)))
    assert pixels.shape == (30, 40, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PHOTO[:-2000], "cannot be decoded"),
        (PHOTO[:100], "cannot be decoded"),
        (encode(photograph(40, 30), "PNG")[:-200], "cannot be decoded"),
        (encode(photograph(40, 30), "PNG")[:30], "cannot be decoded"),
        (b"", "is empty; replace or remove the file"),
        (b"GIF89a......", "neither JPEG nor PNG: 12 bytes beginning 47 49 46"),
    ],
)
def test_broken_files_are_refused(image, message):
    with pytest.raises(DataError, match=message):
        decode(image, lambda width, height: Geometry(None, (width, height)))


def test_a_header_that_claims_a_gigantic_image_is_refused_before_decoding():
    image = bytearray(encode(photograph(40, 30), "PNG"))
    image[16:24] = (100_000).to_bytes(4, "big") * 2
    image[29:33] = zlib.crc32(image[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match="claims 100000 × 100000 pixels"):
        decode(bytes(image), lambda width, height: Geometry(None, (width, height)))


@pytest.mark.parametrize(
    "settings",
    [
        {"interpolation": "nearest"},
        {"scale": (0.5, 0.2)},
        {"ratio": (0.0, 1.0)},
        {"auto_augment": "rand-q9"},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(DataError):
        AugmentSpec(**settings)
