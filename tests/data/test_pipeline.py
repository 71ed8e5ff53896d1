"""The input pipeline: the same batches for any world, thread count and starting point."""

import json
import re
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from data.augment import AugmentSpec, EvalSpec
from data.base import Batch, Cursor, DataError, Shard
from data.folder import FolderSource, SyntheticSource
from data.ledger import settle
from data.mixing import Mixer, MixSpec
from data.order import FullShuffle, StreamShuffle
from data.pipeline import ImagePipeline, eval_batches
from data.randomness import drop_noise


class Sharded(SyntheticSource):
    """Generated images in shards of unequal size."""

    shard_sizes = np.array([100, 37, 0, 163, 200], np.int64)


SOURCE = Sharded(num_samples=500, num_classes=5, size=12)
AUGMENT = AugmentSpec(size=8, auto_augment="rand-m9-mstd0.5-inc1")
MIXER = Mixer(
    MixSpec(num_classes=5, mixup=0.8, cutmix=1.0, label_smoothing=0.1, erase_prob=0.3), seed=3
)
ALONE = Shard(rank=0, world_size=1)
GLOBAL_BATCH = 96
STEPS_PER_EPOCH = 500 // GLOBAL_BATCH


SHUFFLES = {
    "full": FullShuffle(num_samples=500, seed=3),
    "stream": StreamShuffle(shard_sizes=Sharded.shard_sizes, seed=3, lanes=16, window=12),
}


def make_pipeline(source=SOURCE, **settings):
    settings = {"global_batch": GLOBAL_BATCH, "seed": 3, "augment": AUGMENT} | settings
    return ImagePipeline(source, **settings)


def take(pipeline, cursor, shard, count):
    """The first `count` micro-batches, and the cursor after them."""
    stream = pipeline.batches(cursor, shard)
    items = list(islice(stream, count))
    stream.close()
    return [batch for batch, _ in items], items[-1][1]


def everything(batches):
    """All that training makes of micro-batches: a dict of arrays, in the order of positions."""
    parts = []
    for batch in batches:
        images, targets = MIXER(batch)
        noise = drop_noise(3, batch.epoch, batch.positions.numpy(), num_blocks=4)
        parts.append(
            {
                "ids": batch.ids.numpy(),
                "positions": batch.positions.numpy() + 10_000 * batch.epoch,
                "pixels": batch.images.numpy(),
                "labels": batch.labels.numpy(),
                "mixed": images.numpy(),
                "targets": targets.numpy(),
                "drop": noise.transpose(2, 0, 1),
            }
        )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows = np.argsort(joined["positions"])
    return {name: values[rows] for name, values in joined.items()}


def step_of(cursor, world_size, micro_batches, shuffle):
    """One optimizer step on all ranks of a world: its batches, and the next cursor."""
    pipeline = make_pipeline(
        micro_batches=micro_batches, num_workers=1, prefetch=1, mix_group=2, shuffle=shuffle
    )
    ranks = [
        take(pipeline, cursor, Shard(rank=rank, world_size=world_size), micro_batches)
        for rank in range(world_size)
    ]
    batches = [batch for batches, _ in ranks for batch in batches]
    return batches, settle([after for _, after in ranks])


@pytest.fixture(scope="module")
def uninterrupted():
    """Two epochs and a bit on one process."""
    pipeline = make_pipeline()
    return everything(take(pipeline, pipeline.start(), ALONE, 2 * STEPS_PER_EPOCH + 2)[0])


def assert_equal(found, expected, rows=slice(None)):
    for name, values in found.items():
        assert np.array_equal(values, expected[name][rows]), name


@pytest.mark.parametrize("order", SHUFFLES)
@pytest.mark.parametrize(
    "topologies",
    [
        [(1, 2), (2, 1), (3, 2), (4, 1), (8, 2), (5, 1), (7, 2)],
        [(8, 1)] * 2 + [(4, 2)] * 2 + [(3, 1)] * 2 + [(1, 1)],
    ],
)
def test_changing_the_world_in_mid_epoch_changes_nothing(order, topologies):
    """Ids, pixels, mix partners and drop noise are those of one process, bit for bit."""
    whole = make_pipeline(shuffle=SHUFFLES[order])
    expected = everything(take(whole, whole.start(), ALONE, len(topologies))[0])
    cursor, batches = whole.start(), []
    for world_size, micro_batches in topologies:
        step, cursor = step_of(cursor, world_size, micro_batches, SHUFFLES[order])
        batches += step
    assert_equal(everything(batches), expected)


@pytest.mark.parametrize("skipped", [1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1])
def test_resuming_anywhere_gives_the_rest_bit_for_bit(uninterrupted, skipped):
    pipeline = make_pipeline()
    _, cursor = take(pipeline, pipeline.start(), ALONE, skipped)
    cursor = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
    batches, _ = take(make_pipeline(), cursor, ALONE, 2)
    rows = slice(skipped * GLOBAL_BATCH, (skipped + 2) * GLOBAL_BATCH)
    assert_equal(everything(batches), uninterrupted, rows)


@pytest.mark.parametrize(("num_workers", "prefetch"), [(1, 1), (3, 5), (8, 2)])
def test_threads_and_prefetch_change_nothing(uninterrupted, num_workers, prefetch):
    pipeline = make_pipeline(num_workers=num_workers, prefetch=prefetch)
    batches, _ = take(pipeline, pipeline.start(), ALONE, 4)
    assert_equal(everything(batches), uninterrupted, slice(4 * GLOBAL_BATCH))


def test_an_epoch_shows_each_sample_once_and_epochs_differ(uninterrupted):
    usable = STEPS_PER_EPOCH * GLOBAL_BATCH
    first, second = (uninterrupted["ids"][start : start + usable] for start in (0, usable))
    assert len(set(first)) == len(set(second)) == usable
    assert set(first) != set(second)
    shared = np.intersect1d(first, second)[0]
    rows = [int(np.flatnonzero(ids == shared)[0]) for ids in (first, second)]
    views = [uninterrupted["pixels"][rows[0]], uninterrupted["pixels"][usable + rows[1]]]
    assert not np.array_equal(*views), "the same sample looks the same in both epochs"


def test_repeated_samples_look_different_each_time():
    pipeline = make_pipeline(repeats=2)
    batches, _ = take(pipeline, pipeline.start(), ALONE, 2)
    ids = torch.cat([batch.ids for batch in batches]).numpy()
    pixels = torch.cat([batch.images for batch in batches]).numpy()
    first = 0
    (second,) = np.flatnonzero(ids[1:128] == ids[first]) + 1
    assert not np.array_equal(pixels[first], pixels[second])
    assert len(np.unique(ids[:128])) == 64


def test_batches_have_the_promised_shapes_and_labels():
    pipeline = make_pipeline(micro_batches=2)
    (batch, *_), cursor = take(pipeline, pipeline.start(), Shard(rank=1, world_size=2), 1)
    assert isinstance(batch, Batch)
    assert batch.images.shape == (24, 8, 8, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.ids.dtype == batch.positions.dtype == torch.int64
    assert batch.valid.dtype == torch.bool
    assert batch.valid.all()
    assert batch.labels.tolist() == SOURCE.labels[batch.ids.numpy()].tolist()
    assert batch.positions.tolist() == list(range(24, 48))
    assert (cursor.epoch, cursor.samples, cursor.index) == (0, 48, SOURCE.fingerprint)
    assert pipeline.steps_per_epoch == STEPS_PER_EPOCH


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("foveate-data")]


def test_closing_the_stream_ends_the_threads():
    pipeline = make_pipeline(num_workers=3, prefetch=4)
    stream = pipeline.batches(pipeline.start(), ALONE)
    next(stream)
    assert data_threads()
    stream.close()
    assert not data_threads()


def test_dropping_a_stream_without_closing_it_ends_the_threads():
    pipeline = make_pipeline()
    next(pipeline.batches(pipeline.start(), ALONE))
    assert not data_threads()


@pytest.fixture
def folder_with_a_bad_file(tmp_path):
    (tmp_path / "a").mkdir()
    for id in range(8):
        (tmp_path / "a" / f"{id}.png").write_bytes(SOURCE.read(id).image)
    bad = tmp_path / "a" / "5.png"
    bad.write_bytes(bad.read_bytes()[:-60])
    return tmp_path


def test_a_corrupt_sample_is_named_where_it_is_consumed(folder_with_a_bad_file):
    pipeline = make_pipeline(FolderSource(folder_with_a_bad_file), global_batch=2, prefetch=4)
    stream = pipeline.batches(pipeline.start(), ALONE)
    with pytest.raises(DataError, match=r"a/5\.png cannot be decoded"):
        list(islice(stream, 4))
    assert not data_threads()


def test_a_cursor_of_other_data_or_another_seed_is_refused():
    pipeline = make_pipeline()
    other = Cursor(epoch=0, samples=0, seed=3, index="0123456789abcdef")
    message = re.escape("belongs to data set 0123456789ab, but this is " + SOURCE.fingerprint[:12])
    with pytest.raises(DataError, match=message):
        pipeline.batches(other, ALONE)
    with pytest.raises(DataError, match="seed 4, but the seed is 3"):
        pipeline.batches(make_pipeline(seed=4).start(), ALONE)


def test_a_batch_that_is_too_small_is_refused_before_anything_is_loaded():
    pipeline = make_pipeline()
    with pytest.raises(DataError, match=r"96 is too small for 97 processes × 1 micro-batches: use"):
        pipeline.batches(pipeline.start(), Shard(rank=0, world_size=97))
    with pytest.raises(DataError, match="num_workers 0"):
        make_pipeline(num_workers=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_covers_each_sample_once(world_size):
    spec, ids, num_batches = EvalSpec(size=12, crop_pct=1.0), [], set()
    for rank in range(world_size):
        shard = Shard(rank=rank, world_size=world_size)
        batches = list(eval_batches(SOURCE, spec, batch_size=16, shard=shard))
        num_batches.add(len(batches))
        for batch in batches:
            assert batch.images.shape == (16, 12, 12, 3)
            assert torch.equal(batch.valid, batch.ids >= 0)
            assert not batch.images[~batch.valid].any()
            known = batch.ids[batch.valid].numpy()
            assert batch.labels[batch.valid].tolist() == SOURCE.labels[known].tolist()
            ids += known.tolist()
    assert sorted(ids) == list(range(500))
    assert len(num_batches) == 1
    assert not data_threads()


def test_evaluation_left_early_ends_the_threads():
    batches = eval_batches(SOURCE, EvalSpec(size=12), batch_size=16, shard=ALONE)
    next(batches)
    batches.close()
    assert not data_threads()


@pytest.mark.parametrize(("rank", "num_lanes"), [(0, 4), (1, 2)])
def test_a_source_is_told_when_each_shard_is_next_read(rank, num_lanes):
    """Of all lanes that the ranks of a machine read, as the trainer takes the batches."""
    told, sizes = [], np.full(10, 50, np.int64)

    class Listening(SyntheticSource):
        shard_sizes = sizes

        def expect(self, next_use):
            told.append(next_use)

    source = Listening(num_samples=500, num_classes=5, size=12)
    shuffle = StreamShuffle(shard_sizes=sizes, seed=3, lanes=4, window=16)
    pipeline = make_pipeline(source, shuffle=shuffle, prefetch=1, num_workers=1)
    here = {"first_here": 0, "ranks_here": 2} if num_lanes == 4 else {}
    stream = pipeline.batches(pipeline.start(), Shard(rank=rank, world_size=2, **here))
    lanes = np.arange(4) if num_lanes == 4 else np.array([1, 3])
    for step in range(2 * STEPS_PER_EPOCH):
        next(stream)
        epoch, batch = divmod(step, STEPS_PER_EPOCH)
        place = batch * GLOBAL_BATCH // 4
        assert np.array_equal(told[-1], shuffle.next_use(epoch, place, lanes))
    stream.close()
