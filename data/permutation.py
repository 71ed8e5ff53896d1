"""Seeded permutations that are computed, not stored.

Owns the Feistel network below every order. Invariant: where an integer goes depends on it, the
size and the keys alone, so any place of a shuffled set is found without touching the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.randomness import mix64

ROUNDS = 6  # even, so that each half of the bits is replaced equally often


def permute(
    values: NDArray[np.int64],
    sizes: int | NDArray[np.int64],
    keys: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Return where a shuffle of the integers below `sizes` puts `values`, same shape, int64.

    `keys` uint64 [ROUNDS] or values.shape + (ROUNDS,) seed it; `sizes` is one number, or one per
    value. A Feistel network over the smallest power of two that holds all sizes, walking cycles
    until the value falls inside (Black and Rogaway, CT-RSA 2002).
    """
    num_bits = int(np.max(sizes, initial=1) - 1).bit_length()
    keys = np.broadcast_to(keys, (*values.shape, ROUNDS)).reshape(-1, ROUNDS)
    limits = np.broadcast_to(sizes, values.shape).ravel()
    result = _feistel(values.astype(np.uint64).ravel(), keys, num_bits)
    outside = np.flatnonzero(result >= limits)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[outside], num_bits)
        outside = outside[result[outside] >= limits[outside]]
    return result.astype(np.int64).reshape(values.shape)


def _feistel(
    values: NDArray[np.uint64], keys: NDArray[np.uint64], num_bits: int
) -> NDArray[np.uint64]:
    """Permute the integers of `num_bits` bits."""
    low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << (num_bits // 2)) - 1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for index in range(0, ROUNDS, 2):
        low = low ^ (mix64(high + keys[:, index]) & low_mask)
        high = high ^ (mix64(low + keys[:, index + 1]) & high_mask)
    return (high << low_bits) | low
