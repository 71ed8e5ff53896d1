"""RandAugment: policies and operations as timm defines them."""

import math
import random

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_augment

from data.base import DataError
from data.randaugment import OPERATIONS, Policy, apply_policy, parse_policy
from data.randomness import Purpose, uniforms

FILL = (124, 116, 104)
BICUBIC = Image.Resampling.BICUBIC
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8).repeat(7, 0).repeat(8, 1)
)
NAMES = {
    True: timm_augment._RAND_INCREASING_TRANSFORMS,
    False: timm_augment._RAND_TRANSFORMS,
}


def results(count, run):
    """The distinct pictures that `run` gives."""
    return {np.asarray(run(index)).tobytes() for index in range(count)}


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("index", range(len(OPERATIONS)))
@pytest.mark.parametrize("magnitude", [0, 2.3, 5, 9, 10, 15, 25])
def test_operations_equal_timms_at_every_severity(increasing, index, magnitude):
    """Both draw a sign for some operations, so the sets of possible pictures must agree."""
    operation = timm_augment.AugmentOp(
        NAMES[increasing][index],
        prob=1.0,
        magnitude=magnitude,
        hparams={"img_mean": FILL, "interpolation": BICUBIC, "magnitude_max": 30},
    )

    def theirs(seed):
        random.seed(seed)
        try:
            return operation(PICTURE)
        except ValueError:  # keeping no bits means black, which Pillow 13 refuses to posterize to
            assert "Posterize" in operation.name
            return Image.new("RGB", PICTURE.size)

    policy = Policy(
        magnitude=magnitude, max_magnitude=30, num_ops=1, prob=1.0, increasing=increasing
    )
    which = (index + 0.5) / len(OPERATIONS)

    def ours(sign):
        draws = np.array([which, 0.0, 0.0, 0.0, sign * 0.7])
        return apply_policy(PICTURE, policy, draws, resample=BICUBIC, fill=FILL)

    assert results(2, ours) == results(16, theirs)


def test_the_published_policy_is_understood():
    assert parse_policy("rand-m9-mstd0.5-inc1") == Policy(
        magnitude=9, magnitude_std=0.5, increasing=True, num_ops=2, prob=0.5
    )
    assert parse_policy("rand-n3-p0.8-mstd101-mmax7") == Policy(
        num_ops=3, prob=0.8, magnitude_std=math.inf, max_magnitude=7
    )


@pytest.mark.parametrize(
    "text", ["", "augmix-m5", "rand-m", "rand-x3", "rand-m9--inc1", "rand-m-9"]
)
def test_a_policy_that_is_not_understood_is_refused(text):
    with pytest.raises(DataError, match="augmentation policy"):
        parse_policy(text)


def test_each_operation_is_applied_with_its_probability():
    """Two operations at probability 1/2 leave a quarter of pictures untouched, or a little more."""
    policy = parse_policy("rand-m9-mstd0.5-inc1")
    draws = uniforms(0, 0, np.arange(800), Purpose.AUTO_AUGMENT, count=policy.num_draws)
    same = [
        apply_policy(PICTURE, policy, row, resample=BICUBIC, fill=FILL) == PICTURE for row in draws
    ]
    assert 0.22 < np.mean(same) < 0.40
