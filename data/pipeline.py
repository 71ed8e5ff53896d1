"""The input pipeline: from a source and a cursor to micro-batches on the device.

Owns how order, schedule, augmentation and loading are put together, and the ledger that goes with
the cursor.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.augment import AugmentSpec, EvalSpec
from data.base import Audit, Batch, Cursor, DataError, Shard, Source
from data.folder import FolderSource, SyntheticSource
from data.ledger import add, audit
from data.loader import Loader, Plan
from data.order import FullShuffle, Order, Shuffle
from data.schedule import Schedule, evaluation_ids
from data.webdataset import TarSource

_LISTED = 10  # bad samples that a message names
_FORESIGHT = 8  # times a window that the source is told what comes next


def open_source(
    kind: str,
    path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
) -> Source:
    """Open the data set at `path`; `kind` is webdataset, ffcv, folder or synthetic.

    The first two read whatever indexed shards there are, tar or .beton.

    Shards at a URL are kept in `cache_dir`, if given, as far as `cache_bytes` allows. For a
    synthetic set the path spells its parameters: `num_samples=256,num_classes=10,size=32`, each
    optional. Raises DataError for an unknown kind and for anything wrong with the data.
    """
    match kind:
        case "webdataset" | "ffcv" | "ffcv_native":
            return TarSource(path, cache_dir, cache_bytes)
        case "folder":
            return FolderSource(path)
        case "synthetic":
            return SyntheticSource(**_parse_parameters(str(path)))
    raise DataError(f"data source {kind!r} is not one of webdataset, ffcv, folder, synthetic")


class ImagePipeline:
    """The `DataPipeline` of training images.

    Samples come in the order of `shuffle`, all of them shuffled unless told otherwise.
    `global_batch` samples make an optimizer step, cut into `micro_batches`, each rank getting whole
    groups of `mix_group` neighbours; with `repeats` above 1 an epoch shows so many differently
    augmented copies of fewer images. Up to `max_replaced` samples that cannot be used are replaced
    by others. How they are loaded changes nothing about them: `num_workers` threads decode,
    `prefetch` micro-batches are kept ahead, and images, labels and validity end up on `device`.
    Raises DataError if the data set is smaller than a batch.
    """

    def __init__(
        self,
        source: Source,
        *,
        augment: AugmentSpec,
        global_batch: int,
        shuffle: Shuffle | None = None,
        micro_batches: int = 1,
        mix_group: int = 1,
        repeats: int = 1,
        max_replaced: int = 0,
        seed: int = 0,
        num_workers: int = 2,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source = source
        self.augment = augment
        self.seed = seed
        self._shuffle = shuffle or FullShuffle(num_samples=len(source), seed=seed)
        self._order = Order(shuffle=self._shuffle, repeats=repeats)
        self.schedule = Schedule(
            num_positions=self._shuffle.num_positions,
            global_batch=global_batch,
            micro_batches=micro_batches,
            mix_group=mix_group,
            lanes=self._shuffle.lanes,
        )
        self._max_replaced = max_replaced
        self._loader = Loader(
            source,
            num_workers=num_workers,
            prefetch=prefetch,
            device=torch.device(device),
            replace=max_replaced > 0,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return self.schedule.steps_per_epoch

    def start(self) -> Cursor:
        """Return the cursor before the first sample of epoch 0."""
        return Cursor(
            epoch=0,
            samples=0,
            seed=self.seed,
            index=self.source.fingerprint,
            lanes=self._shuffle.lanes,
            window=self._shuffle.window,
        )

    def batches(self, start: Cursor, shard: Shard) -> Generator[tuple[Batch, Cursor]]:
        """Yield this shard's micro-batches from `start` on, each with the cursor that follows it.

        Raises DataError if the cursor belongs to other data, another seed or order, if the global
        batch is too small, and, when its turn comes, for samples that cannot be used, once
        there are more of them than may be replaced.
        """
        self._check(start)
        self.schedule.check(shard)
        return self._batches(start, shard)

    def expected(self, epoch: int) -> Audit:
        """Return what the audit of a whole epoch must be, from the list of samples.

        That is: each sample once, but for those at positions that make no whole batch.
        """
        used, held = self.schedule.used_positions, self._shuffle.num_positions
        if self._order.repeats > 1:
            return audit(self._order.ids(epoch, np.arange(used)))
        left_out = self._shuffle.ids(epoch, np.arange(used, held))
        everything = np.ones(len(self.source), bool)
        everything[left_out] = everything[self._shuffle.left_out(epoch)] = False
        return audit(np.flatnonzero(everything))

    def check_epoch(self, cursor: Cursor) -> None:
        """Raise DataError unless the epoch before the settled `cursor` showed each sample once.

        Or, where one could not be used, another in its place.
        """
        assert cursor.samples == 0, f"{cursor} is not the end of an epoch"
        expected = self.expected(cursor.epoch - 1)
        found = add(cursor.audit, cursor.replaced)
        if found != expected:
            raise DataError(
                f"epoch {cursor.epoch - 1} did not show every sample once: {found} instead "
                f"of {expected}; go back to a checkpoint before it and report this"
            )

    def _check(self, start: Cursor) -> None:
        if start.index != self.source.fingerprint:
            raise DataError(
                f"the cursor belongs to data set {start.index[:12]}, but this is "
                f"{self.source.fingerprint[:12]}: restore the data, or start a new run"
            )
        if start.seed != self.seed:
            raise DataError(
                f"the cursor belongs to seed {start.seed}, but the seed is {self.seed}: keep it, "
                "or start a new run"
            )
        ours = self.start()
        if (start.lanes, start.window) != (ours.lanes, ours.window):
            raise DataError(
                f"the cursor belongs to {_describe_order(start)}, but this is "
                f"{_describe_order(ours)}: keep it, or start a new run"
            )

    def _batches(self, start: Cursor, shard: Shard) -> Generator[tuple[Batch, Cursor]]:
        self._loader.quarantine = set(start.quarantine)
        epoch = start.epoch
        shown = replaced = Audit()
        if shard.rank == 0 and start.samples > 0:
            shown, replaced = start.audit, start.replaced
        part = self.schedule.take(start, shard)
        foretold = self._foretell(part.epoch, part.positions, shard, foretold=None)
        with closing(self._loader.stream(self._plans(start, shard))) as stream:
            for batch, cursor in stream:
                positions = batch.positions.numpy()
                foretold = self._foretell(batch.epoch, positions, shard, foretold=foretold)
                if batch.epoch != epoch:
                    shown = replaced = Audit()
                epoch = batch.epoch
                planned = batch.planned.numpy()
                as_planned = planned == batch.ids.numpy()
                shown = add(shown, audit(planned[as_planned]))
                replaced = add(replaced, audit(planned[~as_planned]))
                quarantine = tuple(sorted(self._loader.quarantine))
                self.check_replaced(quarantine)
                yield batch, replace(cursor, audit=shown, replaced=replaced, quarantine=quarantine)

    def check_replaced(self, quarantine: Sequence[int]) -> None:
        """Raise DataError, naming some, if more samples had to be replaced than may be."""
        if len(quarantine) > self._max_replaced:
            named = [self.source.name(id) for id in quarantine[:_LISTED]]
            more = len(quarantine) - len(named)
            raise DataError(
                f"{len(quarantine)} samples cannot be used, and {self._max_replaced} may be "
                f"replaced: {', '.join(named)}{f' and {more} more' if more else ''}; restore the "
                "files, or allow more"
            )

    def _plans(self, cursor: Cursor, shard: Shard) -> Iterator[Plan]:
        while True:
            part = self.schedule.take(cursor, shard)
            cursor = part.cursor
            ids = self._order.ids(part.epoch, part.positions)
            copies = self._order.copies(part.positions)
            yield Plan(
                epoch=part.epoch,
                ids=ids,
                keys=ids + copies * len(self.source),
                positions=part.positions,
                size=self.augment.size_at(part.epoch),
                render=partial(self.augment.render, seed=self.seed, epoch=part.epoch),
                cursor=cursor,
                weight=part.weight,
            )

    def _foretell(
        self,
        epoch: int,
        positions: NDArray[np.int64],
        shard: Shard,
        *,
        foretold: tuple[int, int] | None,
    ) -> tuple[int, int]:
        """Tell the source when this machine's ranks next read each shard, some times a window.

        `foretold` is what this returned when it was last called.
        """
        place = int(positions[0]) // max(1, self._shuffle.lanes)
        now = epoch, place // max(1, self._shuffle.window // _FORESIGHT)
        if now != foretold:
            first = shard.rank if shard.first_here is None else shard.first_here
            lanes = self.schedule.lanes_of(first, shard.ranks_here, shard.world_size)
            next_use = self._shuffle.next_use(epoch, place, lanes)
            self.source.expect(np.broadcast_to(next_use, self.source.shard_sizes.shape))
        return now


def _describe_order(cursor: Cursor) -> str:
    if cursor.lanes == 0:
        return "the full order"
    return f"the stream order of {cursor.lanes} lanes and windows of {cursor.window}"


def eval_batches(
    source: Source,
    spec: EvalSpec,
    *,
    batch_size: int,
    shard: Shard,
    num_workers: int = 2,
    prefetch: int = 2,
    device: torch.device | str = "cpu",
) -> Generator[Batch]:
    """Yield batches that hold every sample exactly once over all shards, in order.

    Each shard yields the same number of batches, all of `batch_size`; what is missing at the end
    is padded with black images, label 0, id -1 and valid False. Raises DataError as training does.
    """
    loader = Loader(source, num_workers=num_workers, prefetch=prefetch, device=torch.device(device))
    cursor = Cursor(epoch=0, samples=0, seed=0, index=source.fingerprint)
    plans = (
        Plan(
            epoch=0,
            ids=ids,
            keys=ids,
            positions=ids,
            size=spec.size,
            render=lambda samples, keys, out: spec.render(samples, out),
            cursor=cursor,
        )
        for ids in evaluation_ids(len(source), batch_size=batch_size, shard=shard)
    )
    with closing(loader.stream(plans)) as stream:
        for batch, _ in stream:
            yield batch


def _parse_parameters(text: str) -> dict[str, int]:
    """Parse `name=number,…` into the parameters of a synthetic source."""
    known = {field.name for field in fields(SyntheticSource)}
    parameters: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in known or not value.isdecimal():
            raise DataError(
                f"synthetic data set {text!r}: {item!r} is not <name>=<number> with a name of "
                + ", ".join(sorted(known))
            )
        parameters[name] = int(value)
    return parameters
