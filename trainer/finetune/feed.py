"""What a dense fine-tuning run is fed: samples in a seeded order, augmented by seeds of their own.

Invariant: which samples a step sees, and what each looks like, is a function of the seed and the
step, whatever the number of processes and of workers, so that a run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.base import DataError
from data.order import FullShuffle
from data.randomness import Purpose, random_bits
from trainer.config import UserError

Place = tuple[int, int]
"""An epoch and the index of a sample."""


class Samples(Protocol):
    """Labelled pictures, decoded and augmented one by one."""

    def __len__(self) -> int: ...

    def view(self, index: int) -> Any:
        """Return sample `index`, augmented by what torch's generator draws."""
        ...


def seed_of(seed: int, major: int, minor: int, purpose: Purpose) -> int:
    """Return a seed for torch's generator that only these numbers decide."""
    return int(random_bits(seed, major, minor, purpose, count=1).item() >> np.uint64(1))


class Positions(Sampler[list[Place]]):
    """The places in the data of one process's micro-batches, from optimizer step `start` on.

    The epochs follow one another without a gap: every sample is shown once in each.
    """

    def __init__(
        self, num_samples: int, *, seed: int, share: int, accumulate: int, start: int, stop: int,
        rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self.order = FullShuffle(num_samples=num_samples, seed=seed)
        self.share, self.accumulate = share, accumulate
        self.start, self.stop = start, stop
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[Place]]:
        size = self.order.num_samples
        for step in range(self.start, self.stop):
            for part in range(self.accumulate):
                micro = (step * self.accumulate + part) * self.world_size + self.rank
                places = micro * self.share + np.arange(self.share)
                yield [
                    (int(place // size), self._id(int(place // size), int(place % size)))
                    for place in places
                ]

    def _id(self, epoch: int, position: int) -> int:
        return int(self.order.ids(epoch, np.array([position]))[0])


class _Views(Dataset[Any]):
    """Samples by place, each seen by its own seed; an error that names a file is an answer."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __getitem__(self, place: Place) -> Any:
        epoch, index = place
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, epoch, index, Purpose.DENSE_VIEW))
            try:
                return self.samples.view(index)
            except (UserError, DataError) as error:  # a worker would bury it in a traceback
                return error


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, views: list[Any]) -> Any:
        wrong = next((view for view in views if isinstance(view, Exception)), None)
        return self.collate(views) if wrong is None else wrong


def batches(
    samples: Samples,
    positions: Positions,
    collate: Callable[[list[Any]], Any],
    *,
    seed: int,
    num_workers: int,
) -> Iterator[Any]:
    """Yield collated micro-batches; what a sample raises is raised here.

    Raises:
        UserError, DataError: if a picture or its labels cannot be read.
    """
    loader: DataLoader[Any] = DataLoader(
        _Views(samples, seed),
        batch_sampler=positions,
        num_workers=num_workers,
        collate_fn=_Collate(collate),
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
