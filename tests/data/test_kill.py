"""Killed at any moment and started again on other processes, training sees the same images."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.augment import AugmentSpec
from data.base import Cursor, Shard
from data.columns import write_atomically
from data.folder import SyntheticSource
from data.ledger import settle
from data.order import stream_shuffle
from data.pack import pack
from data.pipeline import ImagePipeline
from data.webdataset import TarSource

STEPS = 11
SAVE_EVERY = 2


def consume(shards: Path, folder: Path, world_size: int) -> None:
    """Be all ranks of a world: log what each step shows, and save the cursor now and then."""
    pipelines = [make_pipeline(shards) for _ in range(world_size)]
    cursor = saved_cursor(folder) or pipelines[0].start()
    streams = [
        pipeline.batches(cursor, Shard(rank=rank, world_size=world_size))
        for rank, pipeline in enumerate(pipelines)
    ]
    with (folder / "log.jsonl").open("a") as log:
        while True:
            items = [next(stream) for stream in streams]
            cursor = settle([cursor for _, cursor in items])
            if cursor.samples == 0:
                pipelines[0].check_epoch(cursor)
            batches = [batch for batch, _ in items]
            rows = np.argsort(np.concatenate([batch.positions for batch in batches]))
            ids = np.concatenate([batch.ids for batch in batches])[rows]
            pixels = np.concatenate([batch.images for batch in batches])[rows]
            step = cursor.epoch * pipelines[0].steps_per_epoch + cursor.samples // 24
            line = {"step": step, "ids": ids.tolist(), "pixels": zlib.crc32(pixels.tobytes())}
            print(json.dumps(line), file=log, flush=True)
            if step % SAVE_EVERY == 0:
                write_atomically(folder / "cursor.json", json.dumps(cursor.to_dict()).encode())
            if step == STEPS:
                break
    for stream in streams:
        stream.close()


def make_pipeline(shards):
    source = TarSource(shards)
    shuffle = stream_shuffle(source, seed=4, lanes=12, window=7)
    augment = AugmentSpec(size=8, auto_augment="rand-m9-mstd0.5-inc1")
    return ImagePipeline(source, augment=augment, global_batch=24, shuffle=shuffle, seed=4)


def saved_cursor(folder):
    file = folder / "cursor.json"
    return Cursor.from_dict(json.loads(file.read_text())) if file.exists() else None


def logged(folder):
    """What each step showed; of a step that was made twice, both must agree."""
    steps = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert steps.setdefault(entry["step"], entry) == entry, "a step showed something else"
    return [steps[step] for step in sorted(steps)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "train"
    source = SyntheticSource(num_samples=110, num_classes=5, size=12)
    pack(source, folder, samples_per_shard=20, progress=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    consume(shards, folder, 1)
    assert [line["step"] for line in logged(folder)] == list(range(1, STEPS + 1))
    return logged(folder)


@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4])), max_size=3))
def test_a_run_killed_at_any_step_shows_the_same_ids_and_pixels(
    shards, uninterrupted, tmp_path_factory, kills
):
    folder = tmp_path_factory.mktemp("killed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.loop", "torch._dynamo"])  # one server for all tests
    for num_lines, world_size in [*kills, (0, 2)]:
        process = context.Process(target=consume, args=(shards, folder, world_size))
        process.start()
        kill_after(process, folder / "log.jsonl", num_lines)
    assert logged(folder) == uninterrupted


def kill_after(process, log, num_lines):
    """Kill a process once it has written so many lines more; with none, let it end."""
    before = count_lines(log)
    while process.is_alive() and (num_lines == 0 or count_lines(log) < before + num_lines):
        process.join(0.002)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    with closing(log.open("rb+")) as file:  # a line torn by the kill is no line
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def count_lines(log):
    return log.read_bytes().count(b"\n") if log.exists() else 0
