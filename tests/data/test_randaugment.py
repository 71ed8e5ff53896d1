"""RandAugment: its sets of operations, its choice among them, and the notation of all policies."""

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_augment

from data.augmix import AugMix
from data.autoaugment import POLICIES, AutoAugment
from data.base import DataError
from data.operations import Canvas, Severity
from data.policy import keeps_color_jitter, parse_policy
from data.randaugment import INCREASING, PLAIN, RandAugment
from data.randomness import Purpose, uniforms
from tests.data.pictures import photograph

CANVAS = Canvas(resample=(Image.Resampling.BICUBIC,), fill=(124, 116, 104))
WEIGHTED = "rand-m9-n3-tweights"


def draw(policy, count):
    return uniforms(0, 0, np.arange(count), Purpose.AUTO_AUGMENT, count=policy.num_draws)


@pytest.mark.parametrize(
    "text", ["rand-m9", "rand-m9-inc1", "rand-t3a", WEIGHTED, "rand-inc0-t3aw-m5"]
)
def test_operations_and_their_weights_are_timms(text):
    policy = parse_policy(text)
    published = timm_augment.rand_augment_transform(text)
    assert list(policy.operations) == [operation.name for operation in published.ops]
    assert policy.num_ops == published.num_layers
    assert {operation.magnitude for operation in published.ops} == {policy.magnitude}
    assert {operation.prob for operation in published.ops} == {policy.prob}
    if published.choice_weights is None:
        assert policy.weights is None
    else:
        weights = np.array(policy.weights)
        np.testing.assert_allclose(weights / weights.sum(), published.choice_weights)


def test_the_published_policy_is_understood():
    assert parse_policy("rand-m9-mstd0.5-inc1") == RandAugment(
        magnitude=9, severity=Severity(magnitude_std=0.5), operations=INCREASING
    )
    assert parse_policy("rand-n3-p0.8-mstd101-mmax7") == RandAugment(
        num_ops=3,
        prob=0.8,
        severity=Severity(magnitude_std=math.inf, max_magnitude=7),
        operations=PLAIN,
    )


def test_the_other_policies_are_understood():
    for name, sub_policies in POLICIES.items():
        assert parse_policy(name) == AutoAugment(sub_policies=sub_policies)
    assert parse_policy("v0-mstd0.5").severity == Severity(magnitude_std=0.5)
    assert parse_policy("augmix") == AugMix()
    assert parse_policy("augmix-m5-w4-d2-a0.5-mstd1-b1") == AugMix(
        magnitude=5, width=4, depth=2, alpha=0.5, severity=Severity(magnitude_std=1.0)
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("rand-m", "'m'"),
        ("rand-x3", "'x3'"),
        ("rand-m9--inc1", "''"),
        ("rand-m-9", "'m'"),
        ("rand-m9-w0", "'w0'"),
        ("rand-m9-tw", "'tw'"),
        ("v1", "'v1'"),
        ("v0-m9", "'m9'"),
        ("augmix-n3", "'n3'"),
    ],
)
def test_a_policy_that_is_not_understood_is_refused(text, part):
    with pytest.raises(DataError, match=f"augmentation policy '{text}': {part} is not one of"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rand-n16-tweights", "16 different ones of 15"),
        ("augmix-w0", "width 0"),
        ("augmix-a0", "alpha 0"),
    ],
)
def test_a_policy_that_cannot_be_applied_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        parse_policy(text)


def test_jitter_goes_with_no_policy_and_with_3_augment():
    """As timm's create_transform decides it."""
    keeping = [None, "3a", "rand-m9-t3a", "rand-t3aw"]
    without = ["rand-m9-mstd0.5-inc1", "v0", "originalr-mstd0.5", "augmix-m3", WEIGHTED]
    assert all(map(keeps_color_jitter, keeping))
    assert not any(map(keeps_color_jitter, without))


def test_each_operation_is_applied_with_its_probability():
    """Two operations at probability 1/2 leave a quarter of pictures untouched, or a little more."""
    policy, picture = parse_policy("rand-m9-mstd0.5-inc1"), photograph(48, 40)
    same = [policy.apply(picture, row, CANVAS) == picture for row in draw(policy, 800)]
    assert 0.22 < np.mean(same) < 0.40


def choices(policy, count):
    rows = draw(policy, count).reshape(count, policy.num_ops, -1)
    return [policy.choose(row[:, 0]) for row in rows]


@pytest.mark.parametrize("text", ["rand-n2-inc1", "rand-n3-t3a"])
def test_operations_are_chosen_evenly_and_independently(text):
    policy = parse_policy(text)
    drawn = np.array(choices(policy, 12_000))
    size = len(policy.operations)
    for column in drawn.T:
        shares = np.array([np.mean(column == name) for name in policy.operations])
        assert np.abs(shares * size - 1).max() < 5 * (size / 12_000) ** 0.5
    repeated = np.mean(drawn[:, 0] == drawn[:, 1])
    assert abs(repeated - 1 / size) < 0.015


@pytest.mark.parametrize("text", [WEIGHTED, "rand-n2-t3aw"])
def test_weighted_operations_are_chosen_as_numpy_chooses_without_replacement(text):
    policy, count = parse_policy(text), 12_000
    drawn = choices(policy, count)
    assert all(len(set(names)) == policy.num_ops for names in drawn)
    weights = np.array(policy.weights) / np.sum(policy.weights)
    generator = np.random.default_rng(0)
    expected = [
        generator.choice(policy.operations, policy.num_ops, replace=False, p=weights)
        for _ in range(count)
    ]
    found = Counter(name for names in drawn for name in names)
    wanted = Counter(name for names in expected for name in names)
    first = Counter(names[0] for names in drawn)
    for name, weight in zip(policy.operations, weights, strict=True):
        assert abs(found[name] - wanted[name]) < 6 * max(wanted[name], 20) ** 0.5
        assert abs(first[name] - count * weight) < 5 * max(count * weight, 20) ** 0.5


def test_every_operation_can_be_chosen_when_all_are():
    policy = parse_policy("rand-n15-tweights")
    assert sorted(policy.choose(np.full(15, 1 - 2**-53))) == sorted(policy.operations)
    assert sorted(policy.choose(np.zeros(15))) == sorted(policy.operations)
