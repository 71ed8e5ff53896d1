"""AugMix: its chains against timm's, and its weights against numpy's distributions."""

from itertools import cycle

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_augment

from data.augmix import OPERATIONS, log_gamma_variates, mixing_weights
from data.operations import Canvas
from data.policy import parse_policy
from data.randomness import Purpose, uniforms
from tests.data.pictures import PHOTOGRAPHS, named_photograph

FILL = (124, 116, 104)
BICUBIC = Image.Resampling.BICUBIC
CANVAS = Canvas(resample=(BICUBIC,), fill=FILL)
UNIFORM = {"img_mean": FILL, "interpolation": BICUBIC, "translate_pct": 0.3}


def published(monkeypatch, text, policy, draws, picture):
    """timm's picture, where its generators give what `draws` say."""
    head = 25 * (policy.width + 2)
    weights, share = mixing_weights(draws[:head].reshape(-1, 25), policy.alpha)
    chains = draws[head:].reshape(policy.width, -1)
    depths = cycle(1 + int(row[0] * 3) for row in chains)
    names = cycle(
        [OPERATIONS[int(which * len(OPERATIONS))] for which in row[1::6]] for row in chains
    )
    transform = timm_augment.augment_and_mix_transform(text, dict(UNIFORM))
    known = {operation.name: operation for operation in transform.ops}
    monkeypatch.setattr(timm_augment.np.random, "dirichlet", lambda _: weights)
    monkeypatch.setattr(timm_augment.np.random, "beta", lambda *_: share)
    monkeypatch.setattr(timm_augment.np.random, "randint", lambda *_: next(depths))
    monkeypatch.setattr(
        timm_augment.np.random,
        "choice",
        lambda _, depth, replace: [known[name] for name in next(names)[:depth]],
    )
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: -value)
    monkeypatch.setattr(timm_augment.random, "uniform", lambda low, high: low + 0.7 * (high - low))
    return np.asarray(transform(picture)).astype(int)


@pytest.mark.parametrize("text", ["augmix", "augmix-m9-w4", "augmix-m5-d2-a0.5", "augmix-m9-b1"])
@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_pictures_are_timms_but_for_rounding(monkeypatch, text, photograph):
    """timm cuts off fractions at every step; here they are rounded once."""
    picture, policy = named_photograph(photograph, 96, 64), parse_policy(text)
    for key in range(4):
        draws = uniforms(key, 0, [0], Purpose.AUTO_AUGMENT, count=policy.num_draws)[0]
        steps = draws[25 * (policy.width + 2) :].reshape(policy.width, -1)[:, 1:]
        steps.reshape(policy.width, -1, 6)[..., [2, 4]] = 0.7, 0.9  # magnitude, sign
        found = np.asarray(policy.apply(picture, draws, CANVAS)).astype(int)
        expected = published(monkeypatch, text, policy, draws, picture)
        difference = found - expected
        assert np.abs(difference).max() <= (3 if "b1" in text else 2)
        assert 0 <= difference.mean() < 1.5


def test_a_result_lies_between_the_picture_and_its_chains():
    policy, picture = parse_policy("augmix-m10-d1-w1"), named_photograph("drawn", 48, 32)
    draws = uniforms(0, 0, np.arange(40), Purpose.AUTO_AUGMENT, count=policy.num_draws)
    before = np.asarray(picture).astype(float)
    for row in draws:
        _, share = mixing_weights(row[:75].reshape(3, 25), 1.0)
        mixed = np.asarray(policy.apply(picture, row, CANVAS))
        chain = np.asarray(
            policy._chain(picture, row[75:], Canvas(**vars(CANVAS) | {"translate": 0.3}))
        )
        np.testing.assert_allclose(mixed, before + share * (chain - before), atol=0.51)


@pytest.mark.parametrize("alpha", [0.02, 0.5, 1.0, 4.0])
def test_gamma_variates_are_gamma_distributed(alpha):
    count = 20_000
    draws = uniforms(0, 0, np.arange(count), Purpose.AUTO_AUGMENT, count=25)
    found = np.sort(log_gamma_variates(draws, alpha))
    with np.errstate(divide="ignore"):
        sample = np.random.default_rng(0).gamma(alpha, size=200_000)
        expected = np.sort(np.log(sample))
    ranks = np.searchsorted(expected, found) / len(expected)
    inside = found > -700  # below, numpy's own variates are 0
    assert np.abs(ranks - np.arange(count) / count)[inside].max() < 1.95 / count**0.5 * 1.1


def test_weights_are_dirichlet_and_the_share_beta_distributed():
    count = 6000
    draws = uniforms(0, 0, np.arange(count), Purpose.AUTO_AUGMENT, count=5 * 25)
    drawn = [mixing_weights(row.reshape(5, 25), 1.0) for row in draws]
    weights = np.array([weights for weights, _ in drawn])
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    expected = np.sort(np.random.default_rng(0).dirichlet([1.0] * 3, size=60_000)[:, 0])
    for values, theory in ((weights[:, 0], expected), (weights[:, 2], expected)):
        ranks = np.searchsorted(theory, np.sort(values)) / len(theory)
        assert np.abs(ranks - np.arange(count) / count).max() < 0.03
    shares = np.sort([share for _, share in drawn])  # Beta(1, 1) is uniform
    assert np.abs(shares - np.arange(count) / count).max() < 0.03


def test_tiny_alphas_choose_one_chain():
    draws = uniforms(0, 0, np.arange(200), Purpose.AUTO_AUGMENT, count=5 * 25)
    drawn = [mixing_weights(row.reshape(5, 25), 1e-3) for row in draws]
    weights = np.array([weights for weights, _ in drawn])
    assert np.isfinite(weights).all()
    assert (weights.max(axis=1) > 0.99).mean() > 0.9
