"""Counter-based randomness: keyed, uniform, and indifferent to how it is asked for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.randomness import Purpose, drop_noise, mix64, uniforms


def splitmix64(state: int) -> int:
    """The published algorithm in plain integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


@given(st.integers(0, 2**64 - 1))
def test_the_hash_is_splitmix64(state):
    advanced = (state + 0x9E3779B97F4A7C15) % 2**64
    assert int(mix64(np.array([advanced], np.uint64))[0]) == splitmix64(state)


def test_known_values_of_splitmix64():
    """The first outputs for seed 0, as every implementation of the generator gives them."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(states).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_numbers_are_uniform_and_uncorrelated():
    draws = uniforms(1, 2, np.arange(20_000), Purpose.CROP, count=8)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi_squared = ((counts - 1600) ** 2 / 1600).sum()
    assert chi_squared < 99 + 6 * (2 * 99) ** 0.5
    across = np.corrcoef(draws, rowvar=False) - np.eye(8)
    along = np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]
    assert np.abs(across).max() < 0.05
    assert abs(along) < 0.05


def test_every_part_of_the_key_matters():
    keys = np.arange(50)
    streams = [
        uniforms(seed, epoch, keys, purpose, count=3)
        for seed, epoch, purpose in [
            (0, 0, Purpose.CROP),
            (1, 0, Purpose.CROP),
            (0, 1, Purpose.CROP),
            (0, 0, Purpose.FLIP),
            (-1, 0, Purpose.CROP),
        ]
    ]
    for index, first in enumerate(streams):
        assert len(np.unique(first)) == first.size
        for second in streams[:index]:
            assert not np.isin(first, second).any()


def test_more_numbers_do_not_change_the_first_ones():
    few = uniforms(3, 1, [7, 8], Purpose.MIX, count=2)
    many = uniforms(3, 1, [8, 7, 9], Purpose.MIX, count=5)
    assert np.array_equal(few, many[[1, 0], :2])


def test_drop_noise_follows_the_position_and_nothing_else():
    positions = np.arange(64, 96)
    noise = drop_noise(1, 2, positions, num_blocks=5)
    assert noise.shape == (5, 2, 32)
    assert noise.dtype == np.float32
    assert noise.min() >= 0
    assert noise.max() < 1
    assert np.array_equal(noise[:, :, 16:], drop_noise(1, 2, positions[16:], num_blocks=5))
    assert np.array_equal(noise[:3], drop_noise(1, 2, positions, num_blocks=3))
    assert not np.isin(noise, drop_noise(1, 3, positions, num_blocks=5)).any()
    assert abs(drop_noise(0, 0, np.arange(4000), num_blocks=10).mean() - 0.5) < 0.005
