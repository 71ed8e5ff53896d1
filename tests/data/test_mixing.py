"""On-device mixing against a plain loop in float64, and its draws against their distributions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.base import Batch, DataError
from data.color import ColorSpec, recolor
from data.mixing import (
    Mixer,
    MixSpec,
    draw_erasing,
    draw_mixing,
    normal_noise,
    normalize,
    symmetric_beta,
)
from data.randomness import GOLDEN, Purpose, mix64, stream_keys, uniforms

FULL = MixSpec(num_classes=7, mixup=0.8, cutmix=1.0, label_smoothing=0.1, erase_prob=0.5)


def make_batch(first=0, size=64, *, height=12, width=10, epoch=3):
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (size, height, width, 3), generator=generator)
    positions = torch.arange(first, first + size)
    return Batch(
        images=images.to(torch.uint8),
        labels=torch.randint(0, 7, (size,), generator=generator),
        ids=positions.clone(),
        planned=positions.clone(),
        positions=positions,
        valid=torch.ones(size, dtype=torch.bool),
        epoch=epoch,
    )


def reference_noise(seed, epoch, position, count):
    """Standard normals of one erased image, from integers and the math module."""
    key = int(stream_keys(seed, epoch, [position], Purpose.ERASE_NOISE)[0])
    values = []
    for index in range(1, count + 1):
        word = np.array([(key + index * GOLDEN) % 2**64], np.uint64)
        bits = int(mix64(word)[0])
        radius = math.sqrt(-2 * math.log(((bits >> 40) + 1) / 2**24))
        values.append(radius * math.cos(2 * math.pi * (bits & 0xFFFFFF) / 2**24))
    return values


def reference(batch, spec, seed):
    """Mix sample by sample in float64."""
    mean, std = np.array(spec.mean), np.array(spec.std)
    count, height, width, _ = batch.images.shape
    pixels = (batch.images.numpy() / 255.0 - mean) / std
    first = int(batch.positions[0])
    params = draw_mixing(
        spec, np.arange(first // 2, (first + count) // 2), (height, width), seed=seed, epoch=3
    )
    rows, boxes = draw_erasing(
        batch.positions.numpy(), (height, width), spec.erase_prob, seed=seed, epoch=3
    )
    images, targets = np.zeros_like(pixels), np.zeros((count, spec.num_classes))
    for i in range(count):
        partner = i + 1 if i % 2 == 0 else i - 1
        lam, (top, bottom, left, right) = params.lam[i // 2], params.box[i // 2]
        if bottom > top and right > left:
            images[i] = pixels[i]
            images[i, top:bottom, left:right] = pixels[partner, top:bottom, left:right]
            lam = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            images[i] = lam * pixels[i] + (1 - lam) * pixels[partner]
        for sample, share in ((i, lam), (partner, 1 - lam)):
            for label in range(spec.num_classes):
                hit = label == int(batch.labels[sample])
                smooth = spec.label_smoothing / spec.num_classes
                targets[i, label] += share * (hit * (1 - spec.label_smoothing) + smooth)
    for row, (top, bottom, left, right) in zip(rows, boxes, strict=True):
        noise = reference_noise(seed, 3, int(batch.positions[row]), height * width * 3)
        patch = np.array(noise).reshape(height, width, 3)[top:bottom, left:right]
        images[row, top:bottom, left:right] = patch
    return images.transpose(0, 3, 1, 2), targets


@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        MixSpec(num_classes=7, mixup=0.4),
        MixSpec(num_classes=7, cutmix=1.0),
        MixSpec(num_classes=7, label_smoothing=0.2, erase_prob=1.0),
        MixSpec(num_classes=7),
    ],
)
def test_mixing_equals_a_loop_over_samples(spec):
    batch = make_batch(first=128)
    images, targets = Mixer(spec, seed=9)(batch)
    expected_images, expected_targets = reference(batch, spec, 9)
    assert images.dtype == targets.dtype == torch.float32
    np.testing.assert_allclose(images.numpy(), expected_images, atol=2e-5)
    np.testing.assert_allclose(targets.numpy(), expected_targets, atol=1e-6)


COLOR = ColorSpec(color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale_prob=0.2, solarize_prob=0.2)


def test_colours_are_augmented_before_mixing():
    batch = make_batch(first=64)
    mixer = Mixer(replace(FULL, color=COLOR), seed=5)
    images, targets = mixer(batch)
    colored = recolor(batch.images, COLOR, batch.positions.numpy(), seed=5, epoch=batch.epoch)
    expected, expected_targets = Mixer(FULL, seed=5)(replace(batch, images=colored))
    assert torch.equal(images, expected)
    assert torch.equal(targets, expected_targets)
    assert not torch.equal(images, Mixer(FULL, seed=5)(batch)[0])


def test_outputs_are_channels_last_and_leave_the_batch_alone():
    batch = make_batch()
    before = batch.images.clone()
    images, _ = Mixer(FULL, seed=0)(batch)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images, before)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_share_of_the_batch_is_mixed_as_in_the_whole(world_size):
    batch = make_batch(first=192, size=48 * 8)
    mixer = Mixer(replace(FULL, color=COLOR), seed=4)
    images, targets = mixer(batch)
    share = len(images) // world_size
    for rank in range(world_size):
        rows = slice(rank * share, (rank + 1) * share)
        part = Batch(
            **{
                name: getattr(batch, name)[rows]
                for name in ("images", "labels", "ids", "planned", "positions", "valid")
            },
            epoch=batch.epoch,
        )
        part_images, part_targets = mixer(part)
        assert torch.equal(part_images, images[rows])
        assert torch.equal(part_targets, targets[rows])


def test_seed_and_epoch_change_the_mix():
    batch = make_batch()
    base = Mixer(FULL, seed=0)(batch)[1]
    assert not torch.equal(base, Mixer(FULL, seed=1)(batch)[1])
    assert not torch.equal(base, Mixer(FULL, seed=0)(make_batch(epoch=4))[1])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.51, 0.8, 1.0, 2.5])
def test_lambda_is_beta_distributed(alpha):
    """Kolmogorov and Smirnov's distance between 20,000 draws and numpy's own generator."""
    draws = symmetric_beta(uniforms(0, 0, np.arange(20_000), Purpose.MIX, count=48), alpha)
    expected = np.sort(np.random.default_rng(0).beta(alpha, alpha, size=200_000))
    ranks = np.searchsorted(expected, np.sort(draws)) / len(expected)
    distance = np.abs(ranks - np.arange(20_000) / 20_000).max()
    assert distance < 1.95 / 20_000**0.5 * 1.05


def test_shares_of_cutmix_and_mixup():
    spec = MixSpec(num_classes=2, mixup=0.8, cutmix=1.0, switch_prob=0.4)
    params = draw_mixing(spec, np.arange(20_000), (224, 224), seed=0, epoch=0)
    boxed = params.box[:, 1] > params.box[:, 0]
    assert abs(boxed.mean() - 0.4) < 0.02
    assert (params.lam[~boxed] < 1).mean() > 0.98
    assert params.lam.min() >= 0
    assert params.lam.max() <= 1


def test_erased_rectangles_have_the_published_area_and_aspect():
    positions = np.arange(20_000)
    rows, boxes = draw_erasing(positions, (224, 224), 0.25, seed=0, epoch=0)
    assert abs(len(rows) / 20_000 - 0.25) < 0.01
    height, width = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    area = height * width / 224**2
    assert boxes.min() >= 0
    assert boxes.max() <= 224
    assert 0.018 < area.min() < area.max() < 0.345
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.01
    assert abs(np.log(height / width).mean()) < 0.03


def test_noise_is_standard_normal():
    keys = torch.from_numpy(stream_keys(0, 0, np.arange(64), Purpose.ERASE_NOISE).view(np.int64))
    noise = normal_noise(keys, count=4096).double()
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise.abs() > 1.96).double().mean() - 0.05) < 0.002
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.01


def test_normalize_maps_mean_and_std_as_defined():
    images = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    out = normalize(images, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    expected = [(0 - 0.5) / 0.5, (128 / 255 - 0.25) / 0.25, 1 / 2.0]
    assert out.shape == (1, 3, 1, 1)
    np.testing.assert_allclose(out.flatten().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("switch_prob", 1.5), ("erase_prob", -0.1), ("mixup", -1.0)]
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(DataError, match=str(value)):
        MixSpec(num_classes=2, **{field: value})
