"""Operations and severities, each held to timm's at the same magnitude, pixel by pixel."""

import math

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_augment

from data.operations import DRAWS_PER_STEP, OPERATIONS, Canvas, Severity, Step
from data.randomness import Purpose, uniforms
from tests.data.pictures import PHOTOGRAPHS, named_photograph

FILL = (124, 116, 104)
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
BLOCKS = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8).repeat(7, 0).repeat(8, 1)
)


def ours(name, picture, magnitude, *, sign, share=0.3, translate=0.45):
    step = Step(name=name, prob=1.0, magnitude=magnitude)
    canvas = Canvas(resample=FILTERS, fill=FILL, translate=translate)
    draws = [0.0, 0.0, 0.0, 0.25 if sign > 0 else 0.75, share]
    return np.asarray(step.apply(picture, draws, canvas, Severity(max_magnitude=30)))


def theirs(monkeypatch, name, picture, magnitude, *, sign, share=0.3, **hparams):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: sign * value)
    monkeypatch.setattr(
        timm_augment.random, "uniform", lambda low, high: low + (high - low) * share
    )
    hparams |= {"img_mean": FILL, "interpolation": FILTERS[int(2 * share)], "magnitude_max": 30}
    operation = timm_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    try:
        return np.asarray(operation(picture))
    except ValueError:  # keeping no bits means black, which Pillow 13 refuses to posterize to
        assert "Posterize" in name
        return np.asarray(Image.new("RGB", picture.size))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 2.3, 5, 9, 10, 15, 25])
def test_operations_equal_timms_at_every_severity(monkeypatch, name, magnitude, sign):
    expected = theirs(monkeypatch, name, BLOCKS, magnitude, sign=sign)
    assert np.array_equal(ours(name, BLOCKS, magnitude, sign=sign), expected)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_operations_equal_timms_on_photographs(monkeypatch, name, photograph):
    picture = named_photograph(photograph)
    for magnitude, sign, share in [(3, 1, 0.2), (5, -1, 0.9), (9, 1, 0.6), (10, -1, 0.4)]:
        expected = theirs(monkeypatch, name, picture, magnitude, sign=sign, share=share)
        found = ours(name, picture, magnitude, sign=sign, share=share)
        assert np.array_equal(found, expected), magnitude


@pytest.mark.parametrize("name", ["TranslateXRel", "TranslateYRel"])
def test_translations_reach_as_far_as_the_canvas_says(monkeypatch, name):
    expected = theirs(monkeypatch, name, BLOCKS, 10, sign=1, translate_pct=0.3)
    assert np.array_equal(ours(name, BLOCKS, 10, sign=1, translate=0.3), expected)


def test_a_step_is_applied_with_its_probability():
    step = Step(name="Invert", prob=0.3, magnitude=5)
    canvas = Canvas(resample=FILTERS, fill=FILL)
    draws = uniforms(0, 0, np.arange(4000), Purpose.AUTO_AUGMENT, count=DRAWS_PER_STEP)
    applied = [step.apply(BLOCKS, row, canvas, Severity()) != BLOCKS for row in draws.tolist()]
    assert abs(np.mean(applied) - 0.3) < 0.03


def levels(severity, magnitude):
    draws = uniforms(0, 0, np.arange(20_000), Purpose.AUTO_AUGMENT, count=2)
    return np.array([severity.level(magnitude, *row) for row in draws.tolist()])


def test_severities_are_normal_about_the_magnitude():
    values = levels(Severity(magnitude_std=0.5), 5) * 10
    assert abs(values.mean() - 5) < 0.02
    assert abs(values.std() - 0.5) < 0.01
    assert abs((np.abs(values - 5) > 0.98).mean() - 0.05) < 0.005
    assert levels(Severity(), 5).tolist() == [0.5] * 20_000


def test_severities_end_at_nothing_and_at_the_largest_magnitude():
    values = levels(Severity(magnitude_std=4), 9)
    assert values.min() == 0
    assert values.max() == 1
    assert levels(Severity(magnitude_std=4, max_magnitude=15), 9).max() == 1.5


def test_an_infinite_deviation_means_uniform_severities():
    values = np.sort(levels(Severity(magnitude_std=math.inf), 8))
    assert np.abs(values / 0.8 - np.arange(20_000) / 20_000).max() < 0.015
