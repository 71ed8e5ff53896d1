"""Whole training views, crop to colours, are distributed like those of timm's create_transform."""

import random

import numpy as np
import pytest
import torch
from timm.data import create_transform

from data.augment import AugmentSpec
from data.color import ColorSpec, recolor
from data.policy import keeps_color_jitter
from tests.data.pictures import as_samples, encode, photograph

COUNT, SIZE = 600, 32
JITTER = (0.3, 0.3, 0.3, 0.05)
SETTINGS = [
    (None, "random"),
    ("rand-m7-n3-tweights", "bilinear"),
    ("rand-m9-mstd0.5-inc1", "random"),
    ("rand-m6-t3aw-mstd1", "random"),
    ("original", "bicubic"),
    ("v0-mstd0.5", "random"),
    ("3a", "bicubic"),
    ("augmix-m5", "random"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny operations: more threads would wait for one another most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def our_views(policy, interpolation):
    spec = AugmentSpec(size=SIZE, auto_augment=policy, interpolation=interpolation)
    out = np.empty((COUNT, SIZE, SIZE, 3), np.uint8)
    samples = as_samples([encode(photograph(96, 64), "PNG")] * COUNT)
    assert spec.render(samples, np.arange(COUNT), out, seed=0, epoch=0) == {}
    jitter = JITTER if keeps_color_jitter(policy) else 0.0
    color = ColorSpec(color_jitter=jitter, grayscale_prob=0.3, gaussian_blur_prob=0.4)
    views = recolor(torch.from_numpy(out), color, np.arange(COUNT), seed=0, epoch=0)
    return views.numpy().astype(float)


def timm_views(policy, interpolation):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    transform = create_transform(
        SIZE,
        is_training=True,
        auto_augment=policy,
        color_jitter=JITTER,
        grayscale_prob=0.3,
        gaussian_blur_prob=0.4,
        interpolation=interpolation,
        normalize=False,
    )
    picture, views = photograph(96, 64), []
    while len(views) < COUNT:
        try:
            views.append(transform(picture).permute(1, 2, 0).numpy())
        except ValueError:  # keeping no bits means black, which Pillow 13 refuses to posterize to
            views.append(np.zeros((SIZE, SIZE, 3)))
    return np.stack(views).astype(float)


def measures(views):
    """What tells operations apart: light, contrast, colour, detail, symmetry; [COUNT] each."""
    yield "mean", views.mean(axis=(1, 2, 3))
    yield "contrast", views.std(axis=(1, 2, 3))
    yield "colour", np.ptp(views, axis=3).mean(axis=(1, 2))
    yield "detail", np.abs(np.diff(views, axis=1)).mean(axis=(1, 2, 3))
    yield "red", views[..., 0].mean(axis=(1, 2)) - views[..., 2].mean(axis=(1, 2))
    yield "left", (views[:, :, : SIZE // 2] - views[:, :, SIZE // 2 :]).mean(axis=(1, 2, 3))


@pytest.mark.parametrize(("policy", "interpolation"), SETTINGS)
def test_views_are_distributed_like_timms(policy, interpolation):
    """Kolmogorov and Smirnov's distance of each measure."""
    pairs = zip(
        measures(our_views(policy, interpolation)),
        measures(timm_views(policy, interpolation)),
        strict=True,
    )
    for (name, first), (_, second) in pairs:
        merged = np.sort(np.concatenate([first, second]))
        shares = [np.searchsorted(np.sort(values), merged, "right") for values in (first, second)]
        distance = np.abs(shares[0] - shares[1]).max() / COUNT
        assert distance < 1.95 * (2 / COUNT) ** 0.5, name
