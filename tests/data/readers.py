"""What the processes do that tests of remote sets start: a file of its own, quick to import."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data import remote
from data.webdataset import TarSource


def read_everything(
    rank: int, world_size: int, url: str, folder: str, cache: str, limit: int | None, seed: int
) -> None:
    """Read every sample twice, in another order if there is a seed, and compare with `folder`."""
    source, local = TarSource(url, cache, limit), TarSource(folder)
    ids = np.arange(len(local))
    dist.barrier()
    for _ in range(2):
        if seed:
            ids = np.random.default_rng(seed + rank).permutation(ids)
        for id in ids.tolist():
            assert source.read(id) == local.read(id)


def read_in_a_fork(url: str, folder: Path) -> None:
    """Read samples, fork, and read others on both sides."""
    source, local = TarSource(url), TarSource(folder)
    assert source.read(0) == local.read(0)
    child = os.fork()
    if child == 0:
        os._exit(0 if source.read(1) == local.read(1) else 1)
    assert source.read(2) == local.read(2)
    assert os.waitpid(child, 0) == (child, 0)


def read_one(url: str, cache: Path, chunk: int) -> None:
    """Read a sample of the first shard, which is downloaded in parts of `chunk` bytes."""
    remote._CHUNK, remote._CHUNKS_AHEAD = chunk, 1
    TarSource(url, cache).read(0)
