"""Counter-based randomness: every random number is a hash of what it is for.

Owns the one generator of the data plane. Invariant: a number depends on (seed, epoch, key,
purpose, index) alone, never on how many were drawn before, by whom, or in which order; so there
is no generator state to save, and nothing changes with the number of processes or threads.
The hash is the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied twice.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64's stride
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 0xFFFFFFFFFFFFFFFF


class Purpose(IntEnum):
    """What a number is drawn for: each purpose has its own stream, so that one may grow alone."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    AUTO_AUGMENT = 4
    COLOR_JITTER = 5
    MIX = 6
    ERASE = 7
    ERASE_NOISE = 8
    DROP_PATH = 9
    SYNTHETIC = 10
    SHARDS = 12
    WINDOWS = 13
    GRAYSCALE = 20
    GAUSSIAN_BLUR = 21
    SOLARIZE = 22
    DENSE_VIEW = 30
    STEP = 31
    PASTE = 23


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a bijective 64-bit hash of each element (SplitMix64's output function)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return values ^ (values >> np.uint64(31))


def stream_keys(seed: int, epoch: int, keys: ArrayLike, purpose: Purpose) -> NDArray[np.uint64]:
    """Return one 64-bit stream key per element of `keys` (sample ids or positions), same shape."""
    state = np.zeros(1, np.uint64)
    for word in (seed, epoch, int(purpose)):
        state = mix64(state + np.array([word & _MASK], np.uint64) + np.uint64(GOLDEN))
    return mix64(np.asarray(keys).astype(np.uint64) * np.uint64(GOLDEN) + state)


def random_bits(
    seed: int, epoch: int, keys: ArrayLike, purpose: Purpose, *, count: int
) -> NDArray[np.uint64]:
    """Return uniform 64-bit words, shape keys.shape + (count,)."""
    strides = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix64(stream_keys(seed, epoch, keys, purpose)[..., None] + strides)


def uniforms(
    seed: int, epoch: int, keys: ArrayLike, purpose: Purpose, *, count: int
) -> NDArray[np.float64]:
    """Return float64 numbers uniform in [0, 1), shape keys.shape + (count,)."""
    bits = random_bits(seed, epoch, keys, purpose, count=count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def drop_noise(
    seed: int, epoch: int, positions: ArrayLike, *, num_blocks: int
) -> NDArray[np.float32]:
    """Return the drop-path noise of a micro-batch: float32 in [0, 1), shape [num_blocks, 2, B].

    Element (block, branch, i) depends on (seed, epoch, positions[i], block, branch) alone, so a
    sample's dropped branches (Huang et al., arXiv:1603.09382) are the same on any number of
    processes. Branch 0 is the token mixer, branch 1 the feed-forward part.
    """
    bits = random_bits(seed, epoch, positions, Purpose.DROP_PATH, count=2 * num_blocks)
    noise = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return np.ascontiguousarray(noise.T).reshape(num_blocks, 2, -1)
