"""The ledger of an epoch: proof that each sample was shown once, and which had to be replaced.

Owns what is counted and how it is added up. Invariant: counts and hashes are sums, so that ranks
and restarts only have to add theirs; at the end of an epoch they equal what the list of samples
says by itself, whoever read which part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from data.base import Audit, Cursor
from data.randomness import mix64

_CHUNK = 1 << 20


def audit(ids: NDArray[np.int64]) -> Audit:
    """Return the audit of having shown `ids`, int64 of any shape."""
    total = Audit()
    for start in range(0, ids.size, _CHUNK):
        hashes = mix64(ids.ravel()[start : start + _CHUNK].astype(np.uint64) + np.uint64(1))
        part = Audit(
            count=len(hashes),
            sum=int(hashes.sum(dtype=np.uint64)),
            xor=int(np.bitwise_xor.reduce(hashes)),
        )
        total = add(total, part)
    return total


def add(first: Audit, second: Audit) -> Audit:
    """Return the audit of what both have shown."""
    return Audit(
        count=first.count + second.count,
        sum=(first.sum + second.sum) % 2**64,
        xor=first.xor ^ second.xor,
    )


def settle(cursors: Sequence[Cursor]) -> Cursor:
    """Return the cursor that all ranks agree on, from the one that each was given at one moment.

    What they counted is added and their quarantines are united; in the rest they must be equal.
    """
    audit = reduce(add, (cursor.audit for cursor in cursors))
    replaced = reduce(add, (cursor.replaced for cursor in cursors))
    quarantine = tuple(sorted(set[int]().union(*(cursor.quarantine for cursor in cursors))))
    settled = {
        replace(cursor, audit=audit, replaced=replaced, quarantine=quarantine) for cursor in cursors
    }
    assert len(settled) == 1, f"ranks stand at different places: {cursors}"
    return settled.pop()
