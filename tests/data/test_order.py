"""The order of training: a permutation of the samples in every epoch."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.base import Cursor, DataError, Shard
from data.folder import ArraySource
from data.order import FullShuffle, Order, StreamShuffle, stream_shuffle
from data.schedule import Schedule

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 1)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(-(2**63), 2**63), st.integers(0, 1000))
def test_every_epoch_is_a_permutation(num_samples, seed, epoch):
    ids = FullShuffle(num_samples=num_samples, seed=seed).ids(epoch, np.arange(num_samples))
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


@settings(deadline=None)
@given(st.integers(1, 10**9), st.integers(0, 2**31), st.data())
def test_a_position_has_one_sample_however_it_is_asked_for(num_samples, seed, data):
    positions = np.array(data.draw(st.lists(st.integers(0, num_samples - 1), min_size=1)))
    order = FullShuffle(num_samples=num_samples, seed=seed)
    together = order.ids(3, positions)
    assert together.tolist() == [int(order.ids(3, np.array([p]))[0]) for p in positions]
    assert together.min() >= 0
    assert together.max() < num_samples


@pytest.mark.parametrize("num_samples", [63, 1000, 50_000])
def test_epochs_and_seeds_differ_and_look_random(num_samples):
    positions = np.arange(num_samples)
    orders = [
        FullShuffle(num_samples=num_samples, seed=seed).ids(epoch, positions)
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**40, 0)]
    ]
    for index, first in enumerate(orders):
        assert (first == positions).mean() < 0.1
        assert abs(np.corrcoef(first, positions)[0, 1]) < 6 / num_samples**0.5
        for second in orders[:index]:
            assert (first == second).mean() < 0.1


def test_class_sorted_data_is_mixed_like_a_true_shuffle():
    """1,000 of 100,000 samples sorted into 1,000 classes: about 632 distinct ones are ideal."""
    ids = FullShuffle(num_samples=100_000, seed=1).ids(0, np.arange(1000))
    assert 590 < len(np.unique(ids // 100)) < 675


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_samples_share_an_epoch_but_no_pair(repeats):
    positions = np.arange(64 * repeats * 20)
    order = Order(shuffle=FullShuffle(num_samples=len(positions), seed=0), repeats=repeats)
    ids, copies = order.ids(0, positions), order.copies(positions)
    assert len(np.unique(ids)) == len(positions) // repeats
    assert len(set(zip(ids.tolist(), copies.tolist(), strict=True))) == len(positions)
    pairs = np.sort(ids.reshape(-1, 2), axis=1)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len(np.unique(pairs, axis=0)) >= 2 * len(pairs) // repeats
    for start in range(0, len(positions), 64 * repeats):
        assert len(np.unique(ids[start : start + 64 * repeats])) == 64


@pytest.mark.parametrize("num_samples", [10, 70, 100, 200])
def test_repeats_work_on_sets_that_end_within_a_block(num_samples):
    positions = np.arange(num_samples)
    order = Order(shuffle=FullShuffle(num_samples=num_samples, seed=0), repeats=3)
    ids, copies = order.ids(0, positions), order.copies(positions)
    assert ids.min() >= 0
    assert ids.max() < num_samples
    assert len(set(zip(ids.tolist(), copies.tolist(), strict=True))) == num_samples


def test_no_repeats_at_all_are_refused():
    with pytest.raises(DataError, match="repeats 0"):
        Order(shuffle=FullShuffle(num_samples=10, seed=0), repeats=0)


def stream(sizes, **settings):
    settings = {"seed": 3, "lanes": 1, "window": 8} | settings
    return StreamShuffle(shard_sizes=np.array(sizes, np.int64), **settings)


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 50), st.integers(0, 3))
def test_a_stream_shows_every_sample_once_or_says_that_it_leaves_it_out(
    sizes, lanes, window, epoch
):
    if sum(sizes) < 2 * lanes:
        with pytest.raises(DataError, match=f"do not fill {lanes} lanes with two each"):
            stream(sizes, lanes=lanes)
        return
    shuffle = stream(sizes, lanes=lanes, window=window)
    ids = shuffle.ids(epoch, np.arange(shuffle.num_positions))
    left_out = shuffle.left_out(epoch)
    assert len(left_out) == sum(sizes) % (2 * lanes)
    assert np.sort(np.concatenate([ids, left_out])).tolist() == list(range(sum(sizes)))


@settings(deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 50), st.randoms())
def test_a_stream_can_be_asked_in_any_order(sizes, lanes, window, random):
    lanes = min(lanes, sum(sizes) // 2)
    shuffle = stream(sizes, lanes=lanes, window=window)
    positions = list(range(shuffle.num_positions))
    scanned = dict(zip(positions, shuffle.ids(1, np.array(positions)).tolist(), strict=True))
    random.shuffle(positions)
    found = shuffle.ids(1, np.array(positions)).tolist()
    assert found == [scanned[position] for position in positions]
    assert shuffle.ids(1, np.array(positions[:1])).tolist() == found[:1]


@settings(deadline=None, max_examples=50)
@given(SIZES, st.integers(1, 6), st.integers(1, 30), st.data())
def test_the_next_use_of_a_shard_is_when_it_is_next_read(sizes, lanes, window, data):
    """By hand: walk through the windows of some lanes, and see which shards each may touch."""
    lanes = min(lanes, sum(sizes) // 2)
    shuffle = stream(sizes, lanes=lanes, window=window)
    first = data.draw(st.integers(0, lanes - 1))
    ours = np.arange(first, data.draw(st.integers(first + 1, lanes)))
    place = data.draw(st.integers(0, shuffle.lane_length - 1))
    ends = np.cumsum(sizes)
    length = shuffle.lane_length
    touched = {}  # shard -> the first place from `place` on whose window holds any of it
    for step in range(2 * length - place):
        epoch, now = divmod(place + step, length)
        start = next(s for s in range(now, -1, -1) if is_window_start(shuffle, s))
        end = next((e for e in range(now + 1, length) if is_window_start(shuffle, e)), length)
        for lane in ours:
            places = np.arange(start, end)
            positions = (places // 2 * lanes + lane) * 2 + places % 2
            for shard in np.searchsorted(ends, shuffle.ids(epoch, positions), side="right"):
                touched.setdefault(int(shard), step)
    expected = [touched.get(shard, 2 * length) for shard in range(len(sizes))]
    assert shuffle.next_use(0, place, ours).tolist() == expected


def is_window_start(shuffle, place):
    """Windows are of equal length to within one, and as few as that allows."""
    count = -(-shuffle.lane_length // shuffle.window)
    return place in {index * shuffle.lane_length // count for index in range(count)}


def test_imagenet_sized_streams_are_planned_fast_in_little_memory():
    """1.28 M samples in 1,281 shards on 64 ranks: what one rank reads, and what it costs."""
    sizes = np.full(1281, 1000, np.int64)
    shuffle = StreamShuffle(shard_sizes=sizes, seed=0, lanes=64, window=16_384)
    schedule = Schedule(num_positions=shuffle.num_positions, global_batch=4096, lanes=64)
    cursor = Cursor(epoch=0, samples=0, seed=0, index="")
    shards = set()
    tracemalloc.start()
    for _ in range(16):
        part = schedule.take(cursor, Shard(rank=5, world_size=64))
        shards |= set((shuffle.ids(0, part.positions) // 1000).tolist())
        cursor = part.cursor
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(shards) <= 18, "a window of 16,384 lies in 18 shards of 1,000 at most"
    assert peak < 5e6


@pytest.mark.parametrize("num_classes", [10, 100])
def test_sorted_shards_are_not_streamed_unless_asked_for(num_classes):
    labels = np.arange(4000) * num_classes // 4000
    pixels = np.zeros((4000, 1, 1, 3), np.uint8)
    source = ArraySource(images=pixels, labels=labels, classes=("x",) * num_classes)

    class Sharded(ArraySource):
        shard_sizes = np.full(40, 100, np.int64)

    def make(labels, **settings):
        source = Sharded(images=pixels, labels=labels, classes=("x",) * num_classes)
        return stream_shuffle(source, seed=0, lanes=4, window=200, **settings)

    with pytest.raises(
        DataError, match=r"sorted by class: [01]\.\d bits of class entropy per shard"
    ):
        make(labels)
    assert make(labels, allow_unmixed=True).num_positions == 4000
    assert make(np.random.default_rng(0).permutation(labels)).num_positions == 4000
    assert stream_shuffle(source, seed=0, lanes=4, window=200).num_positions == 4000
