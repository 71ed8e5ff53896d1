"""What dense fine-tuning is fed: each sample once an epoch, the same for any processes, workers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import UserError
from trainer.finetune.feed import Positions, batches


class Drawn:
    """Samples that are their own number and a random one."""

    def __init__(self, count, broken=None):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def view(self, index):
        if index == self.broken:
            raise UserError(f"{index}.jpg cannot be read: restore it")
        return index, torch.rand(()).item()


def positions(count, *, rank=0, world_size=1, share=4, accumulate=1, start=0, stop=10, seed=3):
    return Positions(
        count, seed=seed, share=share, accumulate=accumulate, start=start, stop=stop, rank=rank,
        world_size=world_size,
    )  # fmt: skip


def places(**options):
    return [place for batch in positions(**options) for place in batch]


@given(count=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_sample_is_shown_once_in_an_epoch(count, seed):
    seen = places(count=count, share=1, stop=3 * count, seed=seed)
    for epoch in range(3):
        shown = [index for number, index in seen if number == epoch]
        assert sorted(shown) == list(range(count))


@pytest.mark.parametrize(("world_size", "share", "accumulate"), [(1, 6, 1), (3, 2, 1), (1, 2, 3)])
def test_a_step_has_the_same_samples_on_any_number_of_processes(world_size, share, accumulate):
    shown = [
        list(positions(11, rank=rank, world_size=world_size, share=share, accumulate=accumulate))
        for rank in range(world_size)
    ]
    steps = [
        sorted(
            place
            for rank in shown
            for batch in rank[step * accumulate : (step + 1) * accumulate]
            for place in batch
        )
        for step in range(10)
    ]
    alone = [sorted(batch) for batch in positions(11, share=6)]
    assert steps == alone


def test_a_start_in_the_middle_goes_on_with_what_comes_next():
    whole = list(positions(7))
    assert list(positions(7, start=4)) == whole[4:]


def test_what_is_drawn_hangs_on_the_sample_and_its_epoch_alone():
    def fed(**options):
        workers = options.pop("workers", 0)
        stream = batches(Drawn(5), positions(5, **options), list, seed=3, num_workers=workers)
        return list(itertools.chain.from_iterable(stream))

    torch.manual_seed(0)
    first = fed()
    torch.manual_seed(1)
    assert fed(workers=2) == first
    assert fed(share=8, stop=5) == first
    values = [value for _, value in first]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_says_which(workers):
    stream = batches(Drawn(5, broken=2), positions(5), list, seed=0, num_workers=workers)
    with pytest.raises(UserError, match=r"^2\.jpg cannot be read: restore it$"):
        list(stream)


def test_reading_leaves_the_generator_of_the_training_alone():
    stream = batches(Drawn(5), positions(5), list, seed=0, num_workers=0)
    next(stream)
    before = torch.get_rng_state()
    next(stream)
    assert torch.equal(torch.get_rng_state(), before)
