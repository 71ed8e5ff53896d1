"""Colour augmentation of batches against torchvision, and its draws against their distributions."""

from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter
from torchvision.transforms.v2 import functional as F

from data.base import DataError
from data.color import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    ColorParams,
    ColorSpec,
    apply_color,
    draw_color,
    recolor,
)
from tests.data.pictures import PHOTOGRAPHS, named_photograph

EVERYTHING = ColorSpec(
    color_jitter=(0.4, 0.4, 0.2, 0.1),
    color_jitter_prob=0.8,
    grayscale_prob=0.2,
    gaussian_blur_prob=0.5,
    solarize_prob=0.3,
)
ADJUST = {
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
}
FACTORS = {
    BRIGHTNESS: [0.0, 0.6, 0.93, 1.4, 3.0],
    CONTRAST: [0.0, 0.6, 0.93, 1.4, 3.0],
    SATURATION: [0.0, 0.6, 0.93, 1.4, 3.0],
    HUE: [-0.5, -0.1, 0.02, 0.1, 0.35],
}


def params(count, *, order=((0, 1, 2, 3),), **changes):
    """Parameters that change nothing but what is named: `factors` by operation, `gray`…"""
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (count, 1))
    for operation, values in changes.pop("factors", {}).items():
        factors[:, operation] = values
    fields = {
        "gray": np.zeros(count, bool),
        "sigma": np.zeros(count),
        "solarized": np.zeros(count, bool),
    }
    order = np.broadcast_to(order, (count, len(order[0])))
    return ColorParams(order=order, factors=factors, **(fields | changes))


def batch_of(picture, count):
    return torch.from_numpy(np.array(picture))[None].repeat(count, 1, 1, 1)


def channels_first(image):
    return image.permute(2, 0, 1)


def noise(count, height=20, width=24):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator).to(torch.uint8)


def assert_close(found, expected, *, levels=1):
    """Both are [H, W, 3]."""
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= levels, difference.max()


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
@pytest.mark.parametrize("operation", ADJUST)
def test_jitter_operations_equal_torchvisions(photograph, operation):
    picture, factors = named_photograph(photograph), FACTORS[operation]
    images = batch_of(picture, len(factors))
    found = apply_color(images, params(len(factors), factors={operation: factors}))
    assert found.dtype == torch.uint8
    for image, result, factor in zip(images, found, factors, strict=True):
        levels = channels_first(image)
        exact = ADJUST[operation](levels / 255, factor) * 255
        assert_close(result, exact.round().permute(1, 2, 0))
        if operation == HUE or 0.5 < factor < 1.5:  # eight bits of grey err more the stronger
            expected = ADJUST[operation](levels, factor)
            assert_close(result, expected.permute(1, 2, 0), levels=2 if operation == HUE else 1)


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
def test_jitter_operations_equal_pillows(photograph, operation):
    """Its hue has but 256 steps."""
    picture, factors = named_photograph(photograph), [0.6, 0.93, 1.4]
    found = apply_color(batch_of(picture, 3), params(3, factors={operation: factors}))
    for result, factor in zip(found, factors, strict=True):
        assert_close(result, ADJUST[operation](picture, factor))


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_greyscale_and_solarize_equal_torchvisions_and_pillows(photograph):
    picture = named_photograph(photograph)
    images = batch_of(picture, 2)
    gray = apply_color(images, params(2, gray=np.array([True, False])))
    expected = F.rgb_to_grayscale(channels_first(images[0]), num_output_channels=3)
    assert_close(gray[0], expected.permute(1, 2, 0))
    assert_close(gray[0], F.rgb_to_grayscale(picture, num_output_channels=3))
    assert torch.equal(gray[1], images[1])
    solarized = apply_color(images, params(2, solarized=np.array([False, True])))
    assert torch.equal(solarized[0], images[0])
    assert_close(solarized[1], F.solarize(picture, 128), levels=0)


@pytest.mark.parametrize("size", [(240, 160), (30, 14), (12, 40)])
@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_blur_equals_torchvisions(photograph, size):
    picture, sigma = named_photograph(photograph, *size), np.array([0.1, 0.0, 0.8, 2.0])
    images = batch_of(picture, 4)
    found = apply_color(images, params(4, sigma=sigma))
    assert torch.equal(found[1], images[1])
    for row in (0, 2, 3):
        blurred = F.gaussian_blur(channels_first(images[row]), [23, 23], [float(sigma[row])] * 2)
        assert_close(found[row], blurred.permute(1, 2, 0))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (5, 3)])
def test_images_smaller_than_the_kernel_are_blurred_too(height, width):
    images = noise(2, height, width)
    found = apply_color(images, params(2, sigma=np.array([2.0, 2.0])))
    assert found.shape == images.shape
    assert found.float().std() <= images.float().std()
    flat = torch.full_like(images, 77)
    assert torch.equal(apply_color(flat, params(2, sigma=np.array([2.0, 0.3]))), flat)


def test_operations_come_in_their_order_with_one_rounding_at_the_end():
    """Every order of the four, each image by torchvision's operations on floats one by one."""
    orders = list(permutations(range(4)))
    images = batch_of(named_photograph("drawn", 60, 40), len(orders))
    values = {BRIGHTNESS: 1.3, CONTRAST: 0.7, SATURATION: 1.4, HUE: 0.08}
    gray = np.arange(len(orders)) % 3 == 0
    found = apply_color(images, params(len(orders), order=orders, factors=values, gray=gray))
    results = set()
    for row, order in enumerate(orders):
        expected = channels_first(images[row]).float() / 255
        for operation in order:
            expected = ADJUST[operation](expected, values[operation])
        if gray[row]:
            expected = F.rgb_to_grayscale(expected, num_output_channels=3)
        rounded = (expected * 255).round().permute(1, 2, 0)
        assert_close(found[row], rounded)
        results.add(found[row].numpy().tobytes())
    assert len(results) == len(orders)


def test_an_image_becomes_the_same_in_every_batch():
    images, positions = noise(64), np.arange(100, 164)
    together = recolor(images, EVERYTHING, positions, seed=3, epoch=2)
    assert not torch.equal(together, images)
    for rows in ([5], [63, 0], list(range(17, 40)), list(reversed(range(64)))):
        part = recolor(images[rows], EVERYTHING, positions[rows], seed=3, epoch=2)
        assert torch.equal(part, together[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
def test_a_gpu_gives_the_same_colours_in_every_batch():
    images, positions = noise(64), np.arange(64)
    expected = recolor(images, EVERYTHING, positions, seed=3, epoch=2)
    together = recolor(images.cuda(), EVERYTHING, positions, seed=3, epoch=2)
    assert (together.cpu() == expected).float().mean() > 0.99
    rows = list(range(17, 40))
    part = recolor(images[rows].cuda(), EVERYTHING, positions[rows], seed=3, epoch=2)
    assert torch.equal(part, together[rows])


def test_seed_epoch_and_position_change_the_colours():
    images, positions = noise(32), np.arange(32)
    base = recolor(images, EVERYTHING, positions, seed=0, epoch=0)
    assert torch.equal(base, recolor(images, EVERYTHING, positions, seed=0, epoch=0))
    for other in (
        recolor(images, EVERYTHING, positions, seed=1, epoch=0),
        recolor(images, EVERYTHING, positions, seed=0, epoch=1),
        recolor(images, EVERYTHING, positions + 32, seed=0, epoch=0),
    ):
        assert (base != other).any(dim=(1, 2, 3)).float().mean() > 0.7


def test_the_batch_is_left_alone():
    images = noise(16)
    before = images.clone()
    recolor(images, EVERYTHING, np.arange(16), seed=0, epoch=0)
    assert torch.equal(images, before)
    assert recolor(images, ColorSpec(), np.arange(16), seed=0, epoch=0) is images


def test_factors_orders_and_shares_are_distributed_as_defined():
    count = 20_000
    drawn = draw_color(EVERYTHING, np.arange(count), seed=0, epoch=0)
    jittered = (drawn.factors != [1, 1, 1, 0]).any(axis=1)
    assert abs(jittered.mean() - 0.8) < 0.015
    limits = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for values, (low, high) in zip(drawn.factors[jittered].T, limits, strict=True):
        places = np.sort((values - low) / (high - low))
        assert np.abs(places - np.arange(len(places)) / len(places)).max() < 0.015
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(permutations(range(4)))
    assert np.abs(counts * 24 / count - 1).max() < 0.2
    assert abs(drawn.gray.mean() - 0.2) < 0.015
    assert abs(drawn.solarized.mean() - 0.3) < 0.015
    blurred = drawn.sigma[drawn.sigma > 0]
    assert abs(len(blurred) / count - 0.5) < 0.015
    assert 0.1 <= blurred.min() < 0.11 < 1.99 < blurred.max() <= 2.0
    together = np.corrcoef([jittered, drawn.gray, drawn.solarized, drawn.sigma > 0])
    assert np.abs(together - np.eye(4)).max() < 0.03


def test_without_hue_three_operations_are_put_in_order():
    drawn = draw_color(ColorSpec(color_jitter=0.4), np.arange(6000), seed=0, epoch=0)
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(permutations(range(3)))
    assert np.abs(counts - 1000).max() < 150
    assert (drawn.factors[:, HUE] == 0).all()


def test_strong_jitter_does_not_turn_negative():
    drawn = draw_color(ColorSpec(color_jitter=1.5), np.arange(2000), seed=0, epoch=0)
    assert 0 <= drawn.factors[:, :3].min() < 0.01
    assert 2.49 < drawn.factors[:, :3].max() <= 2.5


@pytest.mark.parametrize("strengths", [0.4, (0.4, 0.4, 0.4, 0.1)])
def test_jittered_views_are_distributed_like_torchvisions(strengths):
    """Kolmogorov and Smirnov's distance of the views' means and deviations in each channel."""
    count, picture = 1500, named_photograph("drawn", 24, 16)
    spec = ColorSpec(color_jitter=strengths)
    ours = recolor(batch_of(picture, count), spec, np.arange(count), seed=0, epoch=0).double()
    torch.manual_seed(0)
    transform = ColorJitter(*(strengths if isinstance(strengths, tuple) else (strengths,) * 3))
    views = [torch.from_numpy(np.array(transform(picture))) for _ in range(count)]
    theirs = torch.stack(views).double()
    for measure in (torch.mean, torch.std):
        pairs = zip(measure(ours, dim=(1, 2)).T, measure(theirs, dim=(1, 2)).T, strict=True)
        for first, second in pairs:
            merged = np.sort(np.concatenate([first, second]))
            shares = [
                np.searchsorted(np.sort(values), merged, "right") for values in (first, second)
            ]
            assert np.abs(shares[0] - shares[1]).max() / count < 1.95 * (2 / count) ** 0.5


@pytest.mark.parametrize(
    "picture", [Image.new("RGB", (8, 6)), Image.new("RGB", (8, 6), (255, 255, 255))]
)
def test_black_and_white_have_no_hue_to_turn(picture):
    images = batch_of(picture, 1)
    turned = apply_color(images, params(1, factors={HUE: 0.3, SATURATION: 1.9}))
    assert torch.equal(turned, images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"color_jitter": -0.1}, "-0.1"),
        ({"color_jitter": (0.4, 0.4)}, r"\(0.4, 0.4\) must be one number"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "hue's at most 0.5"),
        ({"color_jitter_prob": 1.1}, "color_jitter_prob 1.1"),
        ({"grayscale_prob": -1.0}, "grayscale_prob -1.0"),
        ({"gaussian_blur_prob": 2.0}, "gaussian_blur_prob 2.0"),
        ({"solarize_prob": 1.5}, "solarize_prob 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        ColorSpec(**settings)
