"""The vocabulary of the data plane: what a sample, a batch, a cursor and a shard are.

Everything here is a plain value. The one invariant: a `Cursor` is the entire state of the data
stream, and the batch that follows it is a pure function of (cursor, source, spec).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class DataError(ValueError):
    """Bad data or data settings: the message names the thing, the value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where the stream stands: identical on all ranks, independent of how many there are.

    `samples` counts the samples of this epoch that the trainer has consumed over all ranks;
    `index` is the fingerprint of the data set, so that a checkpoint cannot be continued on
    other data unnoticed.
    """

    epoch: int
    samples: int
    seed: int
    index: str

    def to_dict(self) -> dict[str, int | str]:
        """Return a JSON-serialisable form (under 1 KB)."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The share of the global batch that one data-parallel rank reads."""

    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One encoded image: the bytes of a JPEG or PNG file, and its place in the data set.

    `regions`, where there is one, is the index that lets parts of a JPEG be decoded by themselves.
    """

    id: int
    image: bytes
    label: int
    regions: bytes | None = None


@dataclass(kw_only=True)
class Batch:
    """A micro-batch of one rank.

    Shapes and dtypes, with B samples of H × W pixels: `images` uint8 [B, H, W, 3]; `labels` int64
    [B]; `ids` int64 [B], the samples' places in the data set; `positions` int64 [B], their places
    in the epoch's order; `valid` bool [B], False for padding (evaluation only). `epoch` counts
    from 0. `images`, `labels` and `valid` are on the training device; `ids` and `positions` stay
    on the CPU, where the randomness that hangs on them is derived without waiting for the device.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    positions: Tensor
    valid: Tensor
    epoch: int


class Source(Protocol):
    """Random access to the encoded samples of a data set, in its canonical order."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes whenever a sample, its label or the order does."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, indexed by label."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every sample, shape [n]."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def read(self, id: int) -> Sample:
        """Return sample `id`; raises DataError naming the file if it cannot be read."""
        ...

    def name(self, id: int) -> str:
        """Where sample `id` lives, for messages: a file, or a shard and the member in it."""
        ...


class DataPipeline(Protocol):
    """A stream of micro-batches that yields its own state."""

    def batches(self, start: Cursor, shard: Shard) -> Generator[tuple[Batch, Cursor]]:
        """Yield micro-batches from `start` on without end, each with the cursor after it."""
        ...
