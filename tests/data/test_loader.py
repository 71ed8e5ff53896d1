"""Loading: a sample that cannot be used is replaced, on every world size by the same one."""

import warnings
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment import AugmentSpec
from data.base import BadSample, DataError, Shard
from data.folder import SyntheticSource
from data.ledger import settle
from data.pipeline import ImagePipeline

ALONE = Shard(rank=0, world_size=1)
NUM_SAMPLES = 48


class Torn(SyntheticSource):
    """Generated images in three shards of 16, of which some are torn and some unreadable."""

    torn: frozenset[int] = frozenset()
    unreadable: frozenset[int] = frozenset()
    shard_sizes = np.array([16, 16, 16], np.int64)

    def read(self, id):
        if id in self.unreadable:
            raise BadSample(f"{self.name(id)} has changed since it was indexed")
        sample = super().read(id)
        return replace(sample, image=sample.image[:-40]) if id in self.torn else sample


def torn_source(torn=(), unreadable=()):
    source = Torn(num_samples=NUM_SAMPLES, num_classes=3, size=6)
    object.__setattr__(source, "torn", frozenset(torn))
    object.__setattr__(source, "unreadable", frozenset(unreadable))
    return source


def make_pipeline(source, **settings):
    settings = {"max_replaced": 20, "num_workers": 2} | settings
    return ImagePipeline(source, augment=AugmentSpec(size=6), global_batch=12, seed=2, **settings)


def epoch_of(source, *, world_size=1, start=None, steps=4, **settings):
    """Show `steps` batches on a world; returns planned and shown ids, pixels, and the cursor."""
    cursors, batches = [], []
    for rank in range(world_size):
        pipeline = make_pipeline(source, **settings)
        stream = pipeline.batches(
            start or pipeline.start(), Shard(rank=rank, world_size=world_size)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            items = list(islice(stream, steps))
        stream.close()
        batches += [batch for batch, _ in items]
        cursors.append(items[-1][1])
    rows = np.argsort(np.concatenate([batch.positions for batch in batches]), kind="stable")
    names = ("planned", "ids", "labels", "images")
    values = {
        name: np.concatenate([getattr(batch, name).numpy() for batch in batches])[rows]
        for name in names
    }
    return values, settle(cursors)


@settings(deadline=None, max_examples=25)
@given(
    st.sets(st.integers(0, NUM_SAMPLES - 1), max_size=10),
    st.sets(st.integers(0, NUM_SAMPLES - 1), max_size=10),
    st.sampled_from([2, 3, 4]),
)
def test_bad_samples_are_replaced_alike_on_every_world(torn, unreadable, world_size):
    bad, source = torn | unreadable, torn_source(torn, unreadable)
    values, cursor = epoch_of(source)
    assert sorted(values["planned"]) == list(range(NUM_SAMPLES))
    assert cursor.quarantine == tuple(sorted(bad))
    for planned, shown in zip(values["planned"], values["ids"], strict=True):
        shard = range(planned // 16 * 16, planned // 16 * 16 + 16)
        following = [*shard[planned % 16 :], *shard[: planned % 16]]
        assert shown == next(id for id in following if id not in bad)
    assert values["labels"].tolist() == source.labels[values["ids"]].tolist()
    spread, other = epoch_of(source, world_size=world_size)
    assert other == cursor
    for name, array in values.items():
        assert np.array_equal(array, spread[name]), name
    whole, _ = epoch_of(torn_source())
    good = values["planned"] == values["ids"]
    assert np.array_equal(values["images"][good], whole["images"][good])


def test_a_repaired_sample_stays_replaced_in_the_same_run():
    """So that a run that was resumed sees what it would have seen without the stop."""
    source = torn_source(torn={7})
    _, cursor = epoch_of(source)
    whole, _ = epoch_of(source, start=cursor)
    repaired, after = epoch_of(torn_source(), start=cursor)
    assert np.array_equal(whole["images"], repaired["images"])
    assert after.quarantine == (7,)


def test_who_takes_whose_place_is_said_once():
    pipeline = make_pipeline(torn_source(torn={5}))
    stream = pipeline.batches(pipeline.start(), ALONE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(islice(stream, 9))
    stream.close()
    (warning,) = caught
    assert str(warning.message).startswith("synthetic sample 5 cannot be decoded")
    assert str(warning.message).endswith("; synthetic sample 6 takes its place")


@pytest.mark.filterwarnings("ignore:synthetic sample")
def test_more_bad_samples_than_allowed_stop_the_run_with_their_names():
    pipeline = make_pipeline(torn_source(torn=range(13)), max_replaced=12, prefetch=4)
    stream = pipeline.batches(pipeline.start(), ALONE)
    message = (
        r"13 samples cannot be used, and 12 may be replaced: synthetic sample 0, .* and 3 more"
    )
    with pytest.raises(DataError, match=message):
        list(islice(stream, 8))


@pytest.mark.filterwarnings("ignore:synthetic sample")
def test_a_shard_without_any_good_sample_is_an_error():
    pipeline = make_pipeline(torn_source(torn=range(16)), max_replaced=40)
    stream = pipeline.batches(pipeline.start(), ALONE)
    with pytest.raises(DataError, match="none of the 64 samples after it can be used"):
        list(islice(stream, 4))


def test_without_an_allowance_the_sample_itself_is_the_error():
    pipeline = make_pipeline(torn_source(torn={5}), max_replaced=0)
    stream = pipeline.batches(pipeline.start(), ALONE)
    with pytest.raises(DataError, match=r"^synthetic sample 5 cannot be decoded"):
        list(islice(stream, 4))


def test_a_cursor_is_small_as_json():
    _, cursor = epoch_of(torn_source(torn=range(1, 16)))
    text = repr(replace(cursor, quarantine=tuple(range(10**6, 10**6 + 60))).to_dict())
    assert len(text) < 1024
