"""The ledger: what an epoch showed, added up over ranks and restarts, and held against the list."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment import AugmentSpec
from data.base import Audit, Cursor, DataError, Shard
from data.folder import SyntheticSource
from data.ledger import add, audit, settle
from data.order import StreamShuffle
from data.pipeline import ImagePipeline


class Sharded(SyntheticSource):
    """Generated images in shards of unequal size."""

    shard_sizes = np.array([20, 7, 23], np.int64)


SOURCE = Sharded(num_samples=50, num_classes=5, size=4)
CURSOR = Cursor(epoch=0, samples=8, seed=0, index="")


def make_pipeline(*, streamed=False, **settings):
    if streamed:
        settings["shuffle"] = StreamShuffle(
            shard_sizes=SOURCE.shard_sizes, seed=1, lanes=4, window=5
        )
    return ImagePipeline(
        SOURCE, augment=AugmentSpec(size=4), global_batch=12, seed=1, num_workers=1, **settings
    )


@given(st.lists(st.integers(0, 10**9), unique=True), st.integers(0, 20))
def test_the_parts_of_an_epoch_add_up_in_any_cut_and_order(ids, cut):
    whole = audit(np.array(ids, np.int64))
    parts = add(audit(np.array(ids[cut:], np.int64)), audit(np.array(ids[:cut], np.int64)))
    assert parts == whole
    assert whole.count == len(ids)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=50, unique=True))
def test_a_sample_shown_twice_in_place_of_another_is_seen(ids):
    right, wrong = np.array(ids), np.array([*ids[:-1], ids[0]])
    assert audit(right) != audit(wrong)


@settings(deadline=None, max_examples=20)
@given(
    st.booleans(),
    st.sampled_from([1, 2]),
    st.lists(st.sampled_from([1, 2, 3, 4]), min_size=4, max_size=4),
)
def test_an_epoch_on_changing_worlds_passes_its_audit(streamed, repeats, worlds):
    cursor = make_pipeline().start() if not streamed else make_pipeline(streamed=True).start()
    for world_size in worlds:  # an epoch is four batches
        cursors = []
        for rank in range(world_size):
            pipeline = make_pipeline(streamed=streamed, repeats=repeats)
            stream = pipeline.batches(cursor, Shard(rank=rank, world_size=world_size))
            cursors.append(next(stream)[1])
            stream.close()
        cursor = settle(cursors)
    assert (cursor.epoch, cursor.samples) == (1, 0)
    assert cursor.audit.count == 48
    pipeline.check_epoch(cursor)
    missing = replace(cursor, audit=replace(cursor.audit, count=47))
    with pytest.raises(DataError, match="epoch 0 did not show every sample once"):
        pipeline.check_epoch(missing)


def test_the_audit_starts_anew_with_each_epoch():
    pipeline = make_pipeline()
    stream = pipeline.batches(pipeline.start(), Shard(rank=0, world_size=1))
    cursors = [cursor for _, cursor in islice(stream, 8)]
    stream.close()
    assert [cursor.audit.count for cursor in cursors] == [12, 24, 36, 48] * 2
    for cursor in (cursors[3], cursors[7]):
        pipeline.check_epoch(cursor)
    assert cursors[3].audit != cursors[7].audit


def test_ranks_settle_on_one_cursor():
    ranks = [
        replace(CURSOR, quarantine=(3, 9), audit=Audit(count=3, sum=2**64 - 1, xor=5)),
        replace(CURSOR, quarantine=(1, 9), audit=Audit(count=4, sum=2, xor=6)),
    ]
    ranks[0] = replace(ranks[0], replaced=Audit(count=1, sum=7, xor=7))
    settled = settle(ranks)
    counted = {"audit": Audit(count=7, sum=1, xor=3), "replaced": Audit(count=1, sum=7, xor=7)}
    assert settled == replace(CURSOR, quarantine=(1, 3, 9), **counted)
    with pytest.raises(AssertionError, match="different places"):
        settle([CURSOR, replace(CURSOR, samples=16)])
