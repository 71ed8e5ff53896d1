"""AutoAugment's policies: the tables and the pictures they make, against timm's."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_augment

from data.autoaugment import POLICIES
from data.operations import DRAWS_PER_STEP, Canvas
from data.policy import parse_policy
from data.randomness import Purpose, uniforms
from tests.data.pictures import PHOTOGRAPHS, named_photograph

FILL = (124, 116, 104)
BICUBIC = Image.Resampling.BICUBIC
CANVAS = Canvas(resample=(BICUBIC,), fill=FILL)


def published(name):
    hparams = {"img_mean": FILL, "interpolation": BICUBIC}
    return timm_augment.auto_augment_transform(name, hparams).policy


@pytest.mark.parametrize("name", POLICIES)
def test_the_tables_are_the_published_ones(name):
    expected = [[(op.name, op.prob, op.magnitude) for op in ops] for ops in published(name)]
    found = [[(step.name, step.prob, step.magnitude) for step in row] for row in POLICIES[name]]
    assert found == expected


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_sub_policy_makes_timms_picture(monkeypatch, name, photograph):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: -value)
    monkeypatch.setattr(timm_augment.random, "uniform", lambda low, high: (low + high) / 2)
    monkeypatch.setattr(timm_augment.random, "random", lambda: 1e-9)  # all but the impossible
    picture, policy = named_photograph(photograph, 96, 64), parse_policy(name)
    for index, operations in enumerate(published(name)):
        draws = np.full(policy.num_draws, 1e-9)
        draws[0] = (index + 0.5) / len(policy.sub_policies)
        draws[1:].reshape(-1, DRAWS_PER_STEP)[:, 3:] = 0.75, 0.5
        expected = picture
        for operation in operations:
            expected = apply_published(operation, expected)
        found = policy.apply(picture, draws, CANVAS)
        assert np.array_equal(np.asarray(found), np.asarray(expected)), policy.sub_policies[index]


def apply_published(operation, picture):
    try:
        return operation(picture)
    except ValueError:  # keeping no bits means black, which Pillow 13 refuses to posterize to
        assert "Posterize" in operation.name
        return Image.new("RGB", picture.size)


@pytest.mark.parametrize("name", ["v0", "3a"])
def test_sub_policies_are_chosen_evenly(name):
    policy, count = parse_policy(name), 5000
    draws = uniforms(0, 0, np.arange(count), Purpose.AUTO_AUGMENT, count=policy.num_draws)
    chosen = (draws[:, 0] * len(policy.sub_policies)).astype(int)
    shares = np.bincount(chosen, minlength=len(policy.sub_policies)) / count
    assert np.abs(shares * len(shares) - 1).max() < 5 * (len(shares) / count) ** 0.5


@pytest.mark.parametrize(
    ("name", "spread", "index"),
    [("v0", "mstd0.5", 2), ("original", "mstd1", 15), ("3a", "mstd2", 0)],
)
def test_policies_vary_their_magnitudes_where_asked_to(name, spread, index):
    picture = named_photograph("drawn", 48, 32)

    def pictures(policy):
        draws = np.full((30, policy.num_draws), 0.1)
        draws[:, 0] = (index + 0.5) / len(policy.sub_policies)
        draws[:, 2:4] = uniforms(0, 0, np.arange(30), Purpose.AUTO_AUGMENT, count=2)
        return {np.asarray(policy.apply(picture, row, CANVAS)).tobytes() for row in draws}

    assert len(pictures(parse_policy(name))) == 1
    assert len(pictures(parse_policy(f"{name}-{spread}"))) > 20
