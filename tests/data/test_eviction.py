"""What a cache holds when it knows what comes: nobody could choose better."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.base import DataError
from data.eviction import check_room, removable, wanted


def next_uses(reads, num_shards):
    """At each read, in how many reads each shard is next read."""
    return [
        np.array([(*reads[now:], shard).index(shard) for shard in range(num_shards)])
        for now in range(len(reads))
    ]


def downloads(reads, num_shards, capacity):
    """How often a cache that evicts as ours downloads a shard."""
    held, count = set(), 0
    for shard, next_use in zip(reads, next_uses(reads, num_shards), strict=True):
        if shard in held:
            continue
        if len(held) == capacity:
            held.remove(removable(held, next_use, shard, at_once=True)[0])
        held.add(shard)
        count += 1
    return count


def fewest_downloads(reads, capacity):
    """The same where each choice of what to evict is tried."""

    @cache
    def fewest(place, held):
        if place == len(reads):
            return 0
        if reads[place] in held:
            return fewest(place + 1, held)
        without = [held] if len(held) < capacity else [held - {shard} for shard in held]
        return 1 + min(fewest(place + 1, kept | {reads[place]}) for kept in without)

    return fewest(0, frozenset())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=14).map(tuple), st.integers(1, 4))
def test_no_choice_downloads_less(reads, capacity):
    assert downloads(reads, 6, capacity) == fewest_downloads(reads, capacity)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=9).map(np.array),
    st.data(),
)
def test_a_shard_that_is_fetched_ahead_displaces_none_that_is_read_before(next_use, data):
    shards = range(len(next_use))
    held = data.draw(st.sets(st.sampled_from(shards)))
    shard = data.draw(st.sampled_from(shards))
    gone = removable(held, next_use, shard, at_once=False)
    assert set(gone) <= held - {shard}
    assert all(next_use[other] >= next_use[shard] for other in gone)
    everything = removable(held, next_use, shard, at_once=True)
    assert sorted(everything) == sorted(held - {shard})
    assert all(next_use[a] >= next_use[b] for a, b in pairwise(everything))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(0, 60),
)
def test_what_is_wanted_fits_and_is_read_before_the_rest(shards, limit):
    next_use, sizes = np.array(shards).T
    held = wanted(next_use, sizes, limit)
    rest = sorted(set(range(len(shards))) - set(held))
    assert sizes[held].sum() <= limit
    assert all(next_use[a] <= next_use[b] for a in held for b in rest)
    if rest:
        following = min(rest, key=lambda shard: (next_use[shard], shard))
        assert sizes[held].sum() + sizes[following] > limit


def test_a_cache_that_cannot_hold_what_is_read_is_refused_with_the_arithmetic():
    next_use, sizes = np.array([9, 0, 5, 0, 7, 8]), np.array([1, 2, 4, 8, 16, 32]) * 10**9
    check_room(next_use, sizes, 30e9, place="here")
    with pytest.raises(DataError) as error:
        check_room(next_use, sizes, 29.5e9, place="here")
    assert "the cache here has room for 29.500 GB, but 2 shards" in str(error.value)
    assert "the next 2 take 30.000 GB: give it as much" in str(error.value)


def test_where_everything_is_read_at_a_time_everything_must_fit():
    sizes = np.full(5, 100)
    check_room(np.zeros(5), sizes, 500, place="here")
    with pytest.raises(DataError, match="5 shards that are read at a time and the next 0 take"):
        check_room(np.zeros(5), sizes, 499, place="here")
