"""Planning ImageNet: what it costs to know which images a rank shows next.

1.28 M samples in 1,281 shards on 64 simulated ranks, in the full and the stream order, beside
torch's DistributedSampler, which draws a permutation of all samples in every process and epoch.
Prints a line of JSON per order: milliseconds to be ready anywhere in an epoch, microseconds per
batch of a rank, and the most memory that planning held.

    python benchmarks/order.py
"""

from __future__ import annotations

import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
from torch.utils.data import DistributedSampler

from data.base import Cursor, Shard
from data.order import FullShuffle, Order, Shuffle, StreamShuffle
from data.schedule import Schedule

NUM_SAMPLES = 1_281_167
NUM_SHARDS = 1281
WORLD_SIZE = 64
GLOBAL_BATCH = 4096
BATCHES = 50

Batches = Callable[[int], Iterator[np.ndarray]]  # rank -> the ids of its batches, mid-epoch


def planned(shuffle: Shuffle) -> Batches:
    """Return the batches of Foveate's order from the middle of an epoch on."""
    order = Order(shuffle=shuffle)
    schedule = Schedule(
        num_positions=shuffle.num_positions, global_batch=GLOBAL_BATCH, lanes=shuffle.lanes
    )

    def batches(rank: int) -> Iterator[np.ndarray]:
        samples = schedule.steps_per_epoch // 2 * GLOBAL_BATCH
        cursor = Cursor(epoch=3, samples=samples, seed=0, index="")
        while True:
            part = schedule.take(cursor, Shard(rank=rank, world_size=WORLD_SIZE))
            cursor = part.cursor
            yield order.ids(part.epoch, part.positions)

    return batches


def sampled(rank: int) -> Iterator[np.ndarray]:
    """Yield the batches that DistributedSampler gives a rank, from the middle of an epoch on."""
    sampler = DistributedSampler(range(NUM_SAMPLES), WORLD_SIZE, rank, drop_last=True)
    sampler.set_epoch(3)
    size = GLOBAL_BATCH // WORLD_SIZE
    ids = islice(iter(sampler), len(sampler) // 2, None)
    while True:
        yield np.array(list(islice(ids, size)))


def measure(name: str, batches: Batches) -> dict[str, float | str]:
    """Time 64 ranks one after the other, then trace the memory of one."""
    ready, each = [], []
    for rank in range(WORLD_SIZE):
        start = time.thread_time()
        stream = batches(rank)
        next(stream)
        ready.append(time.thread_time() - start)
        start = time.thread_time()
        for _ in range(BATCHES):
            next(stream)
        each.append((time.thread_time() - start) / BATCHES)
    tracemalloc.start()
    list(islice(batches(0), BATCHES))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "order": name,
        "ready_ms": round(1e3 * statistics.median(ready), 3),
        "batch_us": round(1e6 * statistics.median(each), 1),
        "peak_mib": round(peak / 2**20, 2),
    }


def main() -> None:
    """Measure each order and print it."""
    sizes = np.full(NUM_SHARDS, 1000, np.int64)
    sizes[-1] += NUM_SAMPLES - sizes.sum()
    print(json.dumps(measure("full", planned(FullShuffle(num_samples=NUM_SAMPLES, seed=0)))))
    print(json.dumps(measure("stream", planned(StreamShuffle(shard_sizes=sizes, seed=0)))))
    print(json.dumps(measure("torch DistributedSampler", sampled)))


if __name__ == "__main__":
    main()
