"""The input pipeline: from a source and a cursor to micro-batches on the device.

Owns the decoding threads and the prefetch queue. Invariant: a batch is assembled by position in
buffers of its own and handed out in order, so neither the number of threads nor their timing can
change what the trainer sees; closing the stream ends every thread.
Threads, not processes: decoding and resampling release the interpreter's lock, and there is
nothing to pickle, to leak, or to restart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment import AugmentSpec, EvalSpec
from data.base import Batch, Cursor, DataError, Sample, Shard, Source
from data.folder import FolderSource, SyntheticSource
from data.order import Order, Schedule, evaluation_ids
from data.webdataset import TarSource

Pixels = NDArray[np.uint8]
Render = Callable[[Sequence[Sample], NDArray[np.int64], Pixels], dict[int, DataError]]


def open_source(kind: str, path: str | Path) -> Source:
    """Open the data set at `path`; `kind` is webdataset, folder or synthetic.

    For a synthetic set the path spells its parameters: `num_samples=256,num_classes=10,size=32`,
    each optional. Raises DataError for an unknown kind and for anything wrong with the data.
    """
    match kind:
        case "webdataset":
            return TarSource(path)
        case "folder":
            return FolderSource(path)
        case "synthetic":
            return SyntheticSource(**_parse_parameters(str(path)))
    raise DataError(f"data source {kind!r} is not one of webdataset, folder, synthetic")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A batch before it is loaded. Ids of -1 are padding; `keys` are what augmentation hangs on."""

    epoch: int
    ids: NDArray[np.int64]
    keys: NDArray[np.int64]
    positions: NDArray[np.int64]
    size: int
    render: Render
    cursor: Cursor


_Pending = tuple[_Plan, Tensor, list[Future[None]]]


class ImagePipeline:
    """The `DataPipeline` of training images.

    `global_batch` samples make an optimizer step, cut into `micro_batches`, each rank getting whole
    groups of `mix_group` neighbours; with `repeats` above 1 an epoch shows so many differently
    augmented copies of fewer images. How they are loaded changes nothing about them: `num_workers`
    threads decode, `prefetch` micro-batches are kept ahead, and images, labels and validity end up
    on `device`. Raises DataError if the data set is smaller than a batch.
    """

    def __init__(
        self,
        source: Source,
        *,
        augment: AugmentSpec,
        global_batch: int,
        micro_batches: int = 1,
        mix_group: int = 1,
        repeats: int = 1,
        seed: int = 0,
        num_workers: int = 2,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source = source
        self.augment = augment
        self.seed = seed
        self.schedule = Schedule(
            num_samples=len(source),
            global_batch=global_batch,
            micro_batches=micro_batches,
            mix_group=mix_group,
        )
        self._order = Order(num_samples=len(source), seed=seed, repeats=repeats)
        self._loader = _Loader(
            source, num_workers=num_workers, prefetch=prefetch, device=torch.device(device)
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return self.schedule.steps_per_epoch

    def start(self) -> Cursor:
        """Return the cursor before the first sample of epoch 0."""
        return Cursor(epoch=0, samples=0, seed=self.seed, index=self.source.fingerprint)

    def batches(self, start: Cursor, shard: Shard) -> Generator[tuple[Batch, Cursor]]:
        """Yield this shard's micro-batches from `start` on, each with the cursor that follows it.

        Raises DataError if the cursor belongs to other data or another seed, if the global batch
        does not divide, and, when its turn comes, for a sample that cannot be read or decoded.
        """
        self._check(start)
        self.schedule.check(shard)
        return self._loader.stream(self._plans(start, shard))

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

    def _plans(self, cursor: Cursor, shard: Shard) -> Iterator[_Plan]:
        while True:
            part = self.schedule.take(cursor, shard)
            cursor = part.cursor
            ids = self._order.ids(part.epoch, part.positions)
            copies = self._order.copies(part.positions)
            yield _Plan(
                epoch=part.epoch,
                ids=ids,
                keys=ids + copies * len(self.source),
                positions=part.positions,
                size=self.augment.size,
                render=partial(self.augment.render, seed=self.seed, epoch=part.epoch),
                cursor=cursor,
            )


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
    loader = _Loader(
        source, num_workers=num_workers, prefetch=prefetch, device=torch.device(device)
    )
    cursor = Cursor(epoch=0, samples=0, seed=0, index=source.fingerprint)
    plans = (
        _Plan(
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


class _Loader:
    """Loads planned batches by threads, ahead of the consumer."""

    def __init__(
        self, source: Source, *, num_workers: int, prefetch: int, device: torch.device
    ) -> None:
        if num_workers < 1 or prefetch < 1:
            raise DataError(f"num_workers {num_workers} and prefetch {prefetch} must be at least 1")
        self._source = source
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._device = device

    def stream(self, plans: Iterator[_Plan]) -> Generator[tuple[Batch, Cursor]]:
        """Yield the batches of `plans` in order, each with its cursor; closing ends the threads."""
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="foveate-data")
        try:
            pending = deque(self._submit(pool, plan) for plan in islice(plans, self._prefetch))
            while pending:
                plan, images, parts = pending.popleft()
                for part in parts:
                    part.result()
                pending.extend(self._submit(pool, plan) for plan in islice(plans, 1))
                yield self._batch(plan, images), plan.cursor
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, plan: _Plan) -> _Pending:
        shape = (len(plan.ids), plan.size, plan.size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        ends = np.linspace(0, len(plan.ids), self._num_workers + 1).astype(int)
        rows = [slice(*ends) for ends in pairwise(ends.tolist())]
        parts = [pool.submit(self._fill, plan, images.numpy(), part) for part in rows]
        return plan, images, parts

    def _fill(self, plan: _Plan, images: Pixels, rows: slice) -> None:
        """Load the samples of `rows` into their rows of `images`; blacken the padding."""
        ids, out = plan.ids[rows], images[rows]
        held = int((ids >= 0).sum())  # padding comes last
        out[held:] = 0
        samples = [self._source.read(id) for id in ids[:held].tolist()]
        failures = plan.render(samples, plan.keys[rows][:held], out[:held])
        for row, error in failures.items():
            raise DataError(f"{self._source.name(samples[row].id)} {error}") from error

    def _batch(self, plan: _Plan, images: Tensor) -> Batch:
        valid = plan.ids >= 0
        labels = np.where(valid, self._source.labels[plan.ids], 0)
        return Batch(
            images=self._to_device(images),
            labels=self._to_device(torch.from_numpy(labels)),
            ids=torch.from_numpy(plan.ids),
            positions=torch.from_numpy(plan.positions),
            valid=self._to_device(torch.from_numpy(valid)),
            epoch=plan.epoch,
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)


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
