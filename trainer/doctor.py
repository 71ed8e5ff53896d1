"""The doctor of the input pipeline: what each stage costs, which one limits a run, what it needs.

Owns the measurements. Each stage is measured by itself on the run's own images, so that the answer
is about this data, these augmentations and this machine. Images are read once, in the order of
some epoch: what was read a moment ago comes from memory, and says nothing of the storage.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from data.augment import AugmentSpec
from data.base import BadSample, Sample, Shard, Source
from data.pipeline import ImagePipeline

from .backends.wrap import build_model, wrap_blocks
from .config import RunConfig
from .inputs import make_mixer, make_pipeline
from .task import classification

_BATCH = 32
_WAITING = 0.5  # cores at work, below which threads that read are waiting for what they read
_MODEL_STEPS = 3  # the first of which warms up


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What an image costs: milliseconds of one core, and images per second where they wait.

    `read_rate` is how many images per second all threads together can read; `model_rate` is how
    many a device trains on; `cores` and `num_workers` are what a process has.
    """

    read_ms: float
    decode_ms: float
    augment_ms: float
    read_rate: float
    model_rate: float
    cores: float
    num_workers: int

    @property
    def core_rate(self) -> float:
        """Images per second that one core prepares."""
        return 1000 / (self.read_ms + self.decode_ms + self.augment_ms)

    @property
    def cores_needed(self) -> float:
        """Cores that keep one device busy."""
        return self.model_rate / self.core_rate

    @property
    def bottleneck(self) -> str:
        """The stage that limits a run: model, storage, read, decode or augment."""
        prepared = self.core_rate * min(self.cores, self.num_workers)
        if self.model_rate <= min(prepared, self.read_rate):
            return "model"
        cores_reading = self.read_rate * self.read_ms / 1000
        if self.read_rate < prepared and cores_reading < _WAITING:
            return "storage"
        costs = {"read": self.read_ms, "decode": self.decode_ms, "augment": self.augment_ms}
        return max(costs, key=lambda stage: costs[stage])

    def __str__(self) -> str:
        """One line: the bottleneck and the cores per device."""
        return (
            f"{self.bottleneck}-bound: a device that takes {self.model_rate:,.0f} images/s needs "
            f"{max(0.1, self.cores_needed):.1f} cores, and has {self.cores:g} with "
            f"{self.num_workers} threads; an image costs {self.read_ms:.2f} ms to read, "
            f"{self.decode_ms:.2f} to decode and {self.augment_ms:.2f} to augment, and "
            f"{self.read_rate:,.0f} are read per second"
        )


def diagnose(config: RunConfig, *, num_images: int, model_rate: float | None) -> Diagnosis:
    """Measure the stages on `num_images` images, and the model unless its rate is given.

    Raises:
        DataError: if the data cannot be read, or there are fewer than two images.
    """
    pipeline = open_pipeline(config, batch_size=2)
    augment, num_workers = pipeline.augment, config.data.num_workers
    epoch = int(np.random.default_rng().integers(1 << 16))  # images that were not read just now
    positions = np.arange(min(num_images, pipeline.schedule.num_positions))
    samples, read_rate, read_ms = _read(
        pipeline.source, pipeline.ids(epoch, positions).tolist(), num_workers
    )
    plain = replace(augment, auto_augment=None)
    _render_ms(augment, samples[:1])  # libraries and tables come up
    decode_ms = _render_ms(plain, samples)
    augment_ms = max(0.0, _render_ms(augment, samples) - decode_ms) if plain != augment else 0.0
    return Diagnosis(
        read_ms=read_ms,
        decode_ms=decode_ms,
        augment_ms=augment_ms,
        read_rate=read_rate,
        model_rate=model_rate or measure_model(config),
        cores=len(os.sched_getaffinity(0)) / max(1, torch.cuda.device_count()),
        num_workers=num_workers,
    )


def open_pipeline(config: RunConfig, *, batch_size: int) -> ImagePipeline:
    """Open the training split in batches of one process, as large as told or as the set allows.

    Raises:
        DataError: if the data cannot be read, or there are fewer than two images.
    """

    def opened(size: int) -> ImagePipeline:
        train = replace(config.train, batch_size=size, accumulate=1)
        return make_pipeline(replace(config, train=train), torch.device("cpu"))

    pipeline = opened(2)
    size = min(batch_size, pipeline.schedule.num_positions)
    size -= size % 2  # images are mixed in pairs
    if size == 2:
        return pipeline
    pipeline.source.close()
    return opened(size)


def measure_model(config: RunConfig) -> float:
    """Return how many images per second this machine's GPU, or its CPU, trains on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config.model, seed=0, device=device)
    wrap_blocks(model, config.memory)
    count = min(_BATCH, config.train.batch_size)
    side = config.model.img_size
    images = torch.zeros(count, 3, side, side, device=device)
    targets = torch.full((count, config.model.num_classes), 1 / config.model.num_classes)
    enabled = config.train.precision == "bf16"
    times = []
    for _ in range(_MODEL_STEPS):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled):
            loss = classification(model, images, targets.to(device), None, z_loss=0.0)
        loss.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return count / min(times[1:])


def _read(source: Source, ids: list[int], num_workers: int) -> tuple[list[Sample], float, float]:
    """Read samples as the loader's threads do, without those that are bad.

    Returns them, how many were read per second, and the milliseconds of CPU time each took.
    """

    def read(id: int) -> Sample | None:
        try:
            return source.read(id)
        except BadSample:  # a run replaces it
            return None

    with ThreadPoolExecutor(num_workers) as pool:
        wall, cpu = time.perf_counter(), time.process_time()
        source.prefetch(ids)
        samples = list(pool.map(read, ids))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return [sample for sample in samples if sample], len(ids) / wall, 1000 * cpu / len(ids)


def _render_ms(augment: AugmentSpec, samples: list[Sample]) -> float:
    """Return the CPU time in which one thread renders a sample, in milliseconds."""
    total = 0.0
    for start in range(0, len(samples), _BATCH):
        part = samples[start : start + _BATCH]
        keys = np.array([sample.id for sample in part], np.int64)
        out = np.empty((len(part), augment.size, augment.size, 3), np.uint8)
        begun = time.thread_time()
        augment.render(part, keys, out, seed=0, epoch=0)
        total += 1000 * (time.thread_time() - begun)
    return total / max(1, len(samples))


def bench(config: RunConfig, *, num_images: int) -> dict[str, float | int]:
    """Run the whole loader over `num_images` images and return its rate and its cost in CPU time.

    Whole batches are counted, so that there may be some fewer.

    Raises:
        DataError: if the data cannot be read, or there are fewer than two images.
    """
    per_batch = max(2, min(_BATCH, config.train.batch_size, num_images // 2))
    pipeline = open_pipeline(config, batch_size=per_batch)
    mixer, per_batch = make_mixer(config), pipeline.schedule.global_batch
    steps = num_images // per_batch
    with closing(pipeline.batches(pipeline.start(), Shard(rank=0, world_size=1))) as stream:
        # Libraries and tables come up, meanwhile batches pile up that would be had for nothing.
        for batch, _ in islice(stream, 1 + config.data.prefetch):
            mixer(batch)
        wall, cpu = time.perf_counter(), time.process_time()
        for batch, _ in islice(stream, steps):
            mixer(batch)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    shown = steps * per_batch
    return {
        "images": shown,
        "images_per_s": round(shown / wall, 1),
        "cpu_ms_per_image": round(1000 * cpu / shown, 3),
        "images_per_s_and_core": round(shown / cpu, 1),
        "num_workers": config.data.num_workers,
    }
