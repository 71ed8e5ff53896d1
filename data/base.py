"""The vocabulary of the data plane: what a sample, a batch, a cursor and a shard are.

Everything here is a plain value. The one invariant: a `Cursor` is the entire state of the data
stream, and the batch that follows it is a pure function of (cursor, source, spec).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class DataError(ValueError):
    """Bad data or data settings: the message names the thing, the value and the remedy."""


class BadSample(DataError):
    """One sample is not what it should be; the others may be: it is named, and can be replaced."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """How many samples were shown, and the sum (mod 2^64) and xor of their ids' 64-bit hashes."""

    count: int = 0
    sum: int = 0
    xor: int = 0


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where the stream stands: the same on any number of ranks, and on all of them once settled.

    `samples` counts the samples of this epoch that the trainer has consumed over all ranks;
    `index` is the fingerprint of the data set, so that a checkpoint cannot be continued on
    other data unnoticed; `lanes` and `window` are those of the order, 0 and 0 if it is the full
    one. `quarantine` are the ids, rising, that could not be used and were replaced; `audit` is of
    what was shown of this epoch, or, at its very beginning, of the epoch before, and `replaced` of
    the samples in whose place others were shown. Of the last three a rank knows its own part:
    `ledger.settle` puts them together.
    """

    epoch: int
    samples: int
    seed: int
    index: str
    lanes: int = 0
    window: int = 0
    quarantine: tuple[int, ...] = ()
    audit: Audit = Audit()
    replaced: Audit = Audit()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form: under 1 KB with up to 60 samples in quarantine."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cursor:
        """Read what to_dict() returned, or what JSON made of it."""
        audits = {name: Audit(**values[name]) for name in ("audit", "replaced")}
        return cls(**{**values, **audits, "quarantine": tuple(values["quarantine"])})


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The share of the global batch that one data-parallel rank reads.

    Of the `world_size` ranks, `ranks_here` neighbours from `first_here` on run on its machine and
    share its cache; unset, it is alone there.
    """

    rank: int
    world_size: int
    first_here: int | None = None
    ranks_here: int = 1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its place in the data set.

    `image` is the bytes of a JPEG or PNG file, or decoded pixels uint8 [H, W, 3]; `regions`, where
    there is one, is the index that lets parts of a JPEG be decoded by themselves.
    """

    id: int
    image: bytes | NDArray[np.uint8]
    label: int
    regions: bytes | None = None


@dataclass(kw_only=True)
class Batch:
    """A micro-batch of one rank.

    Shapes and dtypes, with B samples of H × W pixels: `images` uint8 [B, H, W, 3]; `labels` int64
    [B]; `ids` int64 [B], the samples' places in the data set; `planned` int64 [B], the same but
    for samples that had to be replaced, where it names those; `positions` int64 [B], their places
    in the epoch's order; `valid` bool [B], False for padding (evaluation only). `epoch` counts
    from 0; `weight` is what a mean over this rank's samples counts for in the mean over ranks: 1
    where all have as many. `images`, `labels` and `valid` are on the training device; `ids`,
    `planned` and `positions` stay on the CPU, where the randomness that hangs on them is derived
    without waiting for the device.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    planned: Tensor
    positions: Tensor
    valid: Tensor
    epoch: int
    weight: float = 1.0


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

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Number of samples in each file that is read from end to end, in order."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """Be told in how many places each shard is next read, so that it may be fetched before."""
        ...

    def prefetch(self, ids: Sequence[int]) -> None:
        """Be told that `ids` are read next; returns at once."""
        ...

    def read(self, id: int) -> Sample:
        """Return sample `id`.

        Raises BadSample naming it if it is not what was indexed, and DataError naming the file if
        that cannot be read.
        """
        ...

    def close(self) -> None:
        """End what was begun ahead of reading."""
        ...

    def name(self, id: int) -> str:
        """Where sample `id` lives, for messages: a file, or a shard and the member in it."""
        ...


class DataPipeline(Protocol):
    """A stream of micro-batches that yields its own state."""

    @property
    def source(self) -> Source:
        """The data set behind it."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        ...

    def start(self) -> Cursor:
        """Return the cursor before the first sample of epoch 0."""
        ...

    def batches(self, start: Cursor, shard: Shard) -> Generator[tuple[Batch, Cursor]]:
        """Yield micro-batches from `start` on without end, each with the cursor after it."""
        ...

    def check_epoch(self, cursor: Cursor) -> None:
        """Raise DataError unless the epoch before the settled `cursor` showed each sample once."""
        ...

    def check_replaced(self, quarantine: Sequence[int]) -> None:
        """Raise DataError, naming some, if more samples had to be replaced than may be."""
        ...
