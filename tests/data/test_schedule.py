"""An epoch cut into batches, the same way whoever shares them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.base import Cursor, DataError, Shard
from data.schedule import Schedule, evaluation_ids

START = Cursor(epoch=0, samples=0, seed=5, index="")
WORLDS = (1, 2, 3, 4, 5, 7, 8)


def global_batch(schedule, cursor, world_size):
    """Take one global batch on `world_size` ranks: its positions in order, and the next cursor."""
    parts, epochs = [], set()
    for _ in range(schedule.micro_batches):
        slices = [
            schedule.take(cursor, Shard(rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert len({part.cursor for part in slices}) == 1, "ranks disagree about the cursor"
        parts += [part.positions for part in slices]
        epochs |= {part.epoch for part in slices}
        cursor = slices[0].cursor
    assert len(epochs) == 1, "a global batch spans two epochs"
    return epochs.pop(), np.concatenate(parts), cursor


@settings(deadline=None)
@given(
    st.integers(96, 1000),
    st.lists(st.tuples(st.sampled_from(WORLDS), st.sampled_from([1, 2])), min_size=5, max_size=40),
)
def test_global_batches_do_not_depend_on_world_size_or_accumulation(num_samples, topologies):
    cursor = START
    steps_per_epoch = num_samples // 96
    for step, (world_size, micro_batches) in enumerate(topologies):
        schedule = Schedule(num_positions=num_samples, global_batch=96, micro_batches=micro_batches)
        epoch, positions, cursor = global_batch(schedule, cursor, world_size)
        first = step % steps_per_epoch * 96
        assert epoch == step // steps_per_epoch
        assert positions.tolist() == list(range(first, first + 96))
        assert cursor.epoch * steps_per_epoch * 96 + cursor.samples == (step + 1) * 96


def test_the_cursor_counts_micro_batches_over_all_ranks():
    schedule = Schedule(num_positions=100, global_batch=24, micro_batches=3)
    part = schedule.take(START, Shard(rank=1, world_size=2))
    assert part.positions.tolist() == [4, 5, 6, 7]
    assert part.cursor.samples == 8


def test_the_remainder_is_dropped_and_the_epoch_rolls_over():
    schedule = Schedule(num_positions=21, global_batch=8)
    cursor = START
    seen = []
    for _ in range(4):
        part = schedule.take(cursor, Shard(rank=0, world_size=1))
        seen.append((part.epoch, part.positions[0]))
        cursor = part.cursor
    assert seen == [(0, 0), (0, 8), (1, 0), (1, 8)]
    assert (cursor.epoch, cursor.samples) == (2, 0)


def test_a_batch_that_is_too_small_is_refused_with_the_arithmetic():
    pairs = Schedule(num_positions=1000, global_batch=100, micro_batches=2, mix_group=2)
    with pytest.raises(DataError, match=r"100 is too small for 26 processes × 2 micro-") as error:
        pairs.take(START, Shard(rank=0, world_size=26))
    assert "× 2 images that are mixed: use at least 104, or fewer" in str(error.value)
    alone = Schedule(num_positions=1000, global_batch=100)
    with pytest.raises(DataError, match=r"101 processes × 1 micro-batches: use at least 101"):
        alone.take(START, Shard(rank=0, world_size=101))
    with pytest.raises(DataError, match=r"99 does not divide by 1 micro-batches × 2 images"):
        Schedule(num_positions=1000, global_batch=99, mix_group=2)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2]), st.data())
def test_any_number_of_ranks_shares_a_batch_nearly_evenly(groups, world_size, group, data):
    schedule = Schedule(num_positions=1000, global_batch=groups * group, mix_group=group)
    if world_size > groups:
        return
    ranks = [schedule.take(START, Shard(rank=r, world_size=world_size)) for r in range(world_size)]
    sizes = [len(rank.positions) for rank in ranks]
    assert max(sizes) - min(sizes) in (0, group)
    assert all(size % group == 0 for size in sizes)
    values = np.array(data.draw(st.lists(st.floats(-9, 9), min_size=80, max_size=80)))
    mean = np.mean([rank.weight * values[rank.positions].mean() for rank in ranks])
    assert mean == pytest.approx(values[: groups * group].mean(), abs=1e-12)


def test_without_mixing_a_rank_may_get_a_single_sample():
    schedule = Schedule(num_positions=9, global_batch=3)
    ranks = [schedule.take(START, Shard(rank=rank, world_size=3)) for rank in range(3)]
    assert [rank.positions.tolist() for rank in ranks] == [[0], [1], [2]]


def test_a_cursor_within_a_micro_batch_is_refused():
    schedule = Schedule(num_positions=1000, global_batch=100)
    cursor = Cursor(epoch=0, samples=50, seed=0, index="")
    with pytest.raises(DataError, match="sample 50 of epoch 0"):
        schedule.take(cursor, Shard(rank=0, world_size=1))


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(DataError, match="10 samples, fewer than one global batch of 16"):
        Schedule(num_positions=10, global_batch=16)


@given(st.integers(1, 500), st.integers(1, 40), st.sampled_from(WORLDS))
def test_evaluation_covers_every_id_once_in_equal_batches(num_samples, batch_size, world_size):
    ranks = [
        list(
            evaluation_ids(
                num_samples, batch_size=batch_size, shard=Shard(rank=rank, world_size=world_size)
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(ids) == batch_size for batches in ranks for ids in batches)
    ids = np.concatenate([ids for batches in ranks for ids in batches])
    assert np.sort(ids[ids >= 0]).tolist() == list(range(num_samples))
    assert len(ids) - num_samples < batch_size * world_size


@settings(deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12]),
    st.sampled_from([1, 2]),
    st.sampled_from([8, 12, 24]),
    st.sampled_from([1, 2]),
)
def test_ranks_share_a_batch_with_lanes_and_keep_to_them_where_they_can(
    world_size, micro_batches, lanes, mix_group
):
    schedule = Schedule(
        num_positions=960,
        global_batch=96,
        micro_batches=micro_batches,
        mix_group=mix_group,
        lanes=lanes,
    )
    _, positions, _ = global_batch(schedule, replace(START, samples=96), world_size)
    assert np.sort(positions).tolist() == list(range(96, 192))
    cursor, parts = replace(START, samples=96), []
    for _ in range(micro_batches):
        ranks = [
            schedule.take(cursor, Shard(rank=r, world_size=world_size)) for r in range(world_size)
        ]
        parts += [rank.positions for rank in ranks]
        cursor = ranks[0].cursor
    assert all(part[::mix_group].tolist() == (part[1::2] - 1).tolist() for part in parts) or (
        mix_group == 1
    ), "a pair was torn"
    keeps = lanes % world_size == 0 and 48 // micro_batches % world_size == 0
    for index, part in enumerate(parts):
        rank = index % world_size
        used = set((part // 2 % lanes).tolist())
        named = set(schedule.lanes_of(rank, 1, world_size).tolist())
        assert used <= named
        assert len(named) == (lanes // world_size if keeps else lanes)
    assert schedule.lanes_of(0, world_size, world_size).tolist() == list(range(lanes))
