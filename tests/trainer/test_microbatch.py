"""The largest micro-batch that fits: which one that is, and that all ranks take the same."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.base import Cursor, DataError, Shard
from data.schedule import Schedule
from models.registry import build
from tests.dist import run_distributed
from trainer.config import RunConfig, UserError, override
from trainer.microbatch import (
    fit_microbatch,
    largest_side,
    reserved_bytes,
    smallest_accumulate,
    trial,
    try_out,
)
from trainer.recipes import recipe
from trainer.sections import DataConfig, TrainConfig
from trainer.task import classification

AUTO = ["--train.microbatch", "auto"]


def run_config(*arguments):
    return override(recipe("demo"), [*AUTO, *map(str, arguments)])


START = Cursor(epoch=0, samples=0, seed=0, index="")


def largest_share(accumulate, *, batch, group, world_size):
    """The most images that a rank gets in a micro-batch, or 0 where data cannot be split so."""
    try:
        schedule = Schedule(
            num_positions=batch, global_batch=batch, micro_batches=accumulate, mix_group=group
        )
        ranks = [Shard(rank=rank, world_size=world_size) for rank in range(world_size)]
        return max(len(schedule.take(START, rank).positions) for rank in ranks)
    except DataError:
        return 0


@settings(deadline=None)
@given(st.integers(1, 48), st.sampled_from([1, 2]), st.integers(1, 5), st.integers(1, 60))
def test_it_is_the_smallest_split_whose_largest_share_fits(groups, group, world_size, limit):
    config = replace(
        recipe("demo"),
        train=TrainConfig(batch_size=groups * group),
        data=DataConfig(mixup=group - 1.0),
    )
    found = smallest_accumulate(config, world_size, lambda images: images <= limit)
    where = {"batch": groups * group, "group": group, "world_size": world_size}
    splits = range(1, groups * group + 1)
    possible = [a for a in splits if 0 < largest_share(a, **where) <= limit]
    assert found == (possible[0] if possible else None)


def up_to(limit):
    """A task that runs out of memory above so many images."""

    def task(model, images, targets, noise):
        if images.shape[0] > limit:
            raise torch.OutOfMemoryError
        return classification(model, images, targets, noise, z_loss=0.0)

    return task


def test_a_trial_tells_what_fits():
    config = run_config("--model.img-size", "16")
    model = build("transnext_pico", img_size=16, num_classes=10)
    assert trial(config, model, up_to(3), images=3, reserved=1000)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not trial(config, model, up_to(3), images=4, reserved=1000)

    def broken(model, images, targets, noise):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        trial(config, model, broken, images=1, reserved=0)


def test_trials_go_on_until_one_fits():
    """At the largest size, with blocks wrapped as the run's are; 24 images of 2 processes."""
    config = run_config(
        *("--train.batch-size", "24", "--model.img-size", "16", "--data.mixup", "0.8"),
        *("--train.progressive", "0:16,1:24", "--memory.checkpointing", "full"),
    )
    with mock.patch("torch.cuda.mem_get_info", return_value=(0, 1000)):
        assert try_out(config, torch.device("cpu"), up_to(4), 2) == 3
        assert try_out(config, torch.device("cpu"), up_to(1), 2) is None


def test_what_training_holds_beside_the_model_is_counted():
    with torch.device("meta"):
        model = build("transnext_pico", img_size=16, num_classes=10)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    averaged = run_config("--backend.name", "ddp")
    alone = replace(averaged, train=replace(averaged.train, ema_decay=0.0))
    assert reserved_bytes(averaged, model, 8) == 4 * size
    assert reserved_bytes(alone, model, 8) == 3 * size
    divided = run_config("--backend.name", "fsdp")
    assert reserved_bytes(divided, model, 3) == size
    copied = run_config("--backend.name", "fsdp", "--backend.replicas", "2")
    assert reserved_bytes(copied, model, 6) == size


def test_the_largest_images_decide():
    assert largest_side(run_config()) == 32
    assert largest_side(run_config("--train.progressive", "0:24,1:16")) == 24


def agree(rank, world_size, config, answers):
    """What one rank takes where the GPUs of the ranks answered so."""
    found = mock.patch("trainer.microbatch.try_out", return_value=answers[rank])
    with found, mock.patch("torch.cuda.reset_peak_memory_stats"):
        try:
            fitted = fit_microbatch(RunConfig.from_json(config), torch.device("cuda"), None)
        except UserError as error:
            return str(error)
        return fitted.train.accumulate


def agree_on_all(rank, world_size, config, cases):
    return [agree(rank, world_size, config, answers) for answers in cases]


def test_all_ranks_take_the_same():
    config = run_config("--model.img-size", "64").to_json()
    first, second = run_distributed(agree_on_all, 2, config, [(2, 4), (3, 1), (1, None)])
    assert first == second
    assert first[:2] == [4, 3]
    assert "transnext_pico at 64 pixels fits in the GPU's memory" in first[2]


def test_a_split_that_is_set_is_not_looked_for():
    config = override(recipe("demo"), ["--train.accumulate", "4"])
    assert fit_microbatch(config, torch.device("cuda"), None) is config
    with pytest.raises(UserError, match="give one of the two"):
        run_config("--train.accumulate", "4")
