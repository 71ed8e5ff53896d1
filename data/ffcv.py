"""Batches from FFCV's own loader, for those who want its speed and can do without our promises.

Owns the way from `ffcv.loader.Loader` to `Batch`. What it cannot do, and says so as an error where
it matters: it starts at the beginning of an epoch only, since FFCV has no state; the order depends
on the number of processes, and the last samples that make no whole batch are left out, the same
number in each epoch; crops and flips are FFCV's, drawn by numba's generators, and another time they
are others; its resize has no antialiasing. A sample that cannot be decoded goes unnoticed, and
nothing is audited or replaced. Everything else reads .beton files by `webdataset.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data.base import Batch, Cursor, DataError, Shard
from data.beton import field_names
from data.index import Manifest
from data.webdataset import TarSource


class NativeLoader:
    """FFCV's loader over an indexed folder with one .beton, in the shape of a `DataPipeline`.

    Images are cropped at random by `scale` and `ratio`, resized to `size` × `size`, and mirrored
    with probability `hflip`. `global_batch` samples make a step of all ranks, each of which uses
    `num_workers` threads, keeps `prefetch` batches ahead and moves them to `device`. Raises
    DataError without the package `ffcv`, for other shards, and for fewer samples than a batch.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int,
        global_batch: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        seed: int = 0,
        num_workers: int = 2,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        _require_ffcv()
        self.source = TarSource(folder)
        self.seed = seed
        self._beton = _only_beton(Path(folder))
        with self._beton.open("rb") as file:
            self._fields = field_names(file, str(self._beton))
        self._size, self._scale, self._ratio, self._hflip = size, scale, ratio, hflip
        self._global_batch = global_batch
        self._num_workers, self._prefetch = num_workers, prefetch
        self._device = torch.device(device)
        if not 0 < global_batch <= len(self.source):
            raise DataError(
                f"global_batch {global_batch} must lie in [1, {len(self.source)}], the samples "
                f"of {folder}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return len(self.source) // self._global_batch

    def start(self) -> Cursor:
        """Return the cursor before the first sample of epoch 0."""
        return Cursor(epoch=0, samples=0, seed=self.seed, index=self.source.fingerprint)

    def check_epoch(self, cursor: Cursor) -> None:
        """FFCV keeps no account of what it showed."""

    def check_replaced(self, quarantine: Sequence[int]) -> None:
        """Nothing is ever replaced."""

    def batches(
        self, start: Cursor, shard: Shard, *, while_waiting: Callable[[], None] = lambda: None
    ) -> Generator[tuple[Batch, Cursor]]:
        """Yield this rank's batches from the epoch of `start` on, each with the cursor after it.

        `while_waiting` is never called: files of this machine are there, or an error.
        Raises DataError if the cursor stands within an epoch, or belongs to other data or another
        seed, if the batch does not divide, or torch.distributed does not know the ranks.
        """
        if (start.index, start.seed) != (self.source.fingerprint, self.seed):
            raise DataError(
                f"the cursor belongs to data set {start.index[:12]} and seed {start.seed}, but "
                f"this is {self.source.fingerprint[:12]} and {self.seed}: start a new run"
            )
        if start.samples or start.lanes:
            raise DataError(
                f"the cursor stands at sample {start.samples} of epoch {start.epoch} (lanes "
                f"{start.lanes}), but ffcv_native starts at epochs alone and knows no lanes: go "
                "back to a checkpoint between epochs, or read the .beton as source ffcv"
            )
        if self._global_batch % shard.world_size:
            raise DataError(
                f"global_batch {self._global_batch} does not divide by {shard.world_size} ranks"
            )
        _check_ranks(shard)
        return self._batches(start, shard)

    def _batches(self, start: Cursor, shard: Shard) -> Generator[tuple[Batch, Cursor]]:
        loader = self._loader(shard)
        epoch = start.epoch
        while True:
            loader.next_epoch = epoch
            order = np.asarray(loader.traversal_order.sample_order(epoch), np.int64)
            with closing(iter(loader)) as stream:
                for step in range(self.steps_per_epoch):
                    fields = dict(zip(loader.pipeline_specs, next(stream), strict=True))
                    batch = self._batch(fields, order, epoch, step, shard)
                    yield batch, self._cursor(start, epoch, step)
            epoch += 1

    def _loader(self, shard: Shard) -> Any:
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor

        size = (self._size, self._size)
        crop = RandomResizedCropRGBImageDecoder(size, scale=self._scale, ratio=self._ratio)
        image, label = self._fields
        return Loader(
            str(self._beton),
            batch_size=self._global_batch // shard.world_size,
            num_workers=self._num_workers,
            order=OrderOption.RANDOM,
            distributed=shard.world_size > 1,
            seed=self.seed,
            drop_last=False,  # ranks that are padded would differ in what is whole: we count
            batches_ahead=self._prefetch,
            pipelines={
                image: [crop, RandomHorizontalFlip(self._hflip), ToTensor()],
                label: [IntDecoder(), ToTensor()],
            },
        )

    def _batch(
        self,
        fields: dict[str, torch.Tensor],
        order: NDArray[np.int64],
        epoch: int,
        step: int,
        shard: Shard,
    ) -> Batch:
        image, label = self._fields
        count = self._global_batch // shard.world_size
        ids = torch.from_numpy(order[step * count : (step + 1) * count].copy())
        first = step * self._global_batch + shard.rank * count
        # FFCV writes the next batches into the same memory.
        return Batch(
            images=fields[image].clone().to(self._device, non_blocking=True),
            labels=fields[label][:, 0].clone().to(self._device, non_blocking=True),
            ids=ids,
            planned=ids,
            positions=torch.arange(first, first + count),
            valid=torch.ones(count, dtype=torch.bool, device=self._device),
            epoch=epoch,
        )

    def _cursor(self, start: Cursor, epoch: int, step: int) -> Cursor:
        last = step + 1 == self.steps_per_epoch
        return Cursor(
            epoch=epoch + last,
            samples=0 if last else (step + 1) * self._global_batch,
            seed=start.seed,
            index=start.index,
        )


def _require_ffcv() -> None:
    try:
        import ffcv.loader  # noqa: F401  # that it can be is all there is to know
    except ImportError as error:
        raise DataError(
            f"data source ffcv_native needs the package ffcv ({error}): install the extra ffcv, or "
            "read the .beton as source ffcv"
        ) from error


def _only_beton(folder: Path) -> Path:
    names = [shard.name for shard in Manifest.load(folder).shards]
    if len(names) != 1 or not names[0].endswith(".beton"):
        raise DataError(
            f"{folder} holds {len(names)} shards, {names[0]} first, but ffcv_native reads one "
            ".beton: make it with `foveate data pack --format beton`"
        )
    return folder / names[0]


def _check_ranks(shard: Shard) -> None:
    """FFCV asks torch.distributed for the rank: it must give the same answer."""
    if shard.world_size == 1:
        return
    if not dist.is_initialized():
        raise DataError(f"ffcv_native needs torch.distributed for {shard.world_size} ranks")
    found = (dist.get_rank(), dist.get_world_size())
    if found != (shard.rank, shard.world_size):
        raise DataError(
            f"ffcv_native shares data by torch.distributed, where this is rank {found[0]} of "
            f"{found[1]}, not {shard.rank} of {shard.world_size}"
        )
