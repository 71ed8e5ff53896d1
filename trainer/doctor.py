"""The doctor of the input pipeline: what each stage costs, which one limits a run, what it needs.

Owns the measurements. Each stage is measured by itself on the run's own images, so that the answer
is about this data, these augmentations and this machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from data.augment import AugmentSpec
from data.base import Sample, Shard, Source

from .backends.wrap import build_model, wrap_blocks
from .config import RunConfig
from .inputs import make_mixer, make_pipeline
from .task import classification

_BATCH = 32
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
        if self.read_rate < prepared:
            return "storage"
        costs = {"read": self.read_ms, "decode": self.decode_ms, "augment": self.augment_ms}
        return max(costs, key=lambda stage: costs[stage])

    def __str__(self) -> str:
        """One line: the bottleneck and the cores per device."""
        return (
            f"{self.bottleneck}-bound: a device that takes {self.model_rate:,.0f} images/s needs "
            f"{self.cores_needed:.1f} cores, and has {self.cores:g} with {self.num_workers} "
            f"threads; an image costs {self.read_ms:.2f} ms to read, {self.decode_ms:.2f} to "
            f"decode and {self.augment_ms:.2f} to augment, and {self.read_rate:,.0f} are read per "
            "second"
        )


def diagnose(config: RunConfig, *, num_images: int, model_rate: float | None) -> Diagnosis:
    """Measure the stages on `num_images` images, and the model unless its rate is given.

    Raises:
        DataError: if the data cannot be read.
    """
    pipeline = make_pipeline(config, torch.device("cpu"))
    source, augment = pipeline.source, pipeline.augment
    ids = np.random.default_rng(0).integers(0, len(source), num_images).tolist()
    samples, read_ms = _timed(lambda: [source.read(id) for id in ids])
    plain = replace(augment, auto_augment=None)
    decode_ms = _render_ms(plain, samples)
    augment_ms = max(0.0, _render_ms(augment, samples) - decode_ms) if plain != augment else 0.0
    return Diagnosis(
        read_ms=read_ms / num_images,
        decode_ms=decode_ms / num_images,
        augment_ms=augment_ms / num_images,
        read_rate=_read_rate(source, ids, config.data.num_workers),
        model_rate=model_rate or measure_model(config),
        cores=len(os.sched_getaffinity(0)) / max(1, torch.cuda.device_count()),
        num_workers=config.data.num_workers,
    )


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


def _timed(work: Callable[[], list[Sample]]) -> tuple[list[Sample], float]:
    """Return what `work` does, and the milliseconds of this thread's CPU time that it takes."""
    start = time.thread_time()
    result = work()
    return result, 1000 * (time.thread_time() - start)


def _render_ms(augment: AugmentSpec, samples: list[Sample]) -> float:
    """Return the CPU time in which one thread renders `samples`, in milliseconds."""
    total = 0.0
    for start in range(0, len(samples), _BATCH):
        part = samples[start : start + _BATCH]
        keys = np.array([sample.id for sample in part], np.int64)
        out = np.empty((len(part), augment.size, augment.size, 3), np.uint8)
        begun = time.thread_time()
        augment.render(part, keys, out, seed=0, epoch=0)
        total += 1000 * (time.thread_time() - begun)
    return total


def _read_rate(source: Source, ids: list[int], num_workers: int) -> float:
    """Return how many images per second `num_workers` threads read together."""
    with ThreadPoolExecutor(num_workers) as pool:
        begun = time.perf_counter()
        for _ in pool.map(source.read, ids):
            pass
        return len(ids) / (time.perf_counter() - begun)


def bench(config: RunConfig, *, num_images: int) -> dict[str, float | int]:
    """Run the whole loader over `num_images` images and return its rate and its cost in CPU time.

    Raises:
        DataError: if the data cannot be read.
    """
    per_batch = max(2, min(_BATCH, config.train.batch_size, num_images // 2))
    train = replace(config.train, batch_size=per_batch - per_batch % 2, accumulate=1)
    pipeline = make_pipeline(replace(config, train=train), torch.device("cpu"))
    mixer = make_mixer(config)
    steps = num_images // train.batch_size
    with closing(pipeline.batches(pipeline.start(), Shard(rank=0, world_size=1))) as stream:
        mixer(next(stream)[0])  # threads, tables and libraries come up
        wall, cpu = time.perf_counter(), time.process_time()
        for batch, _ in islice(stream, steps):
            mixer(batch)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    shown = steps * train.batch_size
    return {
        "images": shown,
        "images_per_s": round(shown / wall, 1),
        "cpu_ms_per_image": round(1000 * cpu / shown, 3),
        "images_per_s_and_core": round(shown / cpu, 1),
        "num_workers": config.data.num_workers,
    }
