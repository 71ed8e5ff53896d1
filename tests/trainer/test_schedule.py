"""Schedules against timm's and the published numbers, and what a step then computes."""

import math
from dataclasses import replace

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from models.registry import build
from trainer.config import override
from trainer.recipes import recipe
from trainer.schedule import hyper_at, learning_rate

STEPS_PER_EPOCH = 1251  # ImageNet-1k in batches of 1,024


def schedule(name, **changes):
    config = recipe(name)
    optim = replace(config.optim, **changes)
    total = config.train.epochs * STEPS_PER_EPOCH

    def at(epoch):
        step = round(epoch * STEPS_PER_EPOCH)
        return learning_rate(step, optim, steps_per_epoch=STEPS_PER_EPOCH, total_steps=total)

    return at


def cosine(share):
    """The published cosine from 1e-3 to 1e-5, `share` of the way through."""
    return 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * share)) / 2


def test_the_published_schedule_of_transnext():
    at = schedule("transnext_base")
    assert at(0) == pytest.approx(1e-6)
    assert at(2.5) == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-3)
    # The phase counts from the first step: after the warm-up the cosine has already moved.
    assert at(5) == pytest.approx(cosine(5 / 300))
    assert at(150) == pytest.approx((1e-3 + 1e-5) / 2)
    assert at(300) == pytest.approx(1e-5)


def test_the_published_schedule_of_transxnet_cools_down():
    at = schedule("transxnet_t")
    assert at(5) == pytest.approx(1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * 5 / 300)) / 2)
    assert at(299.9) > 1e-5
    assert {at(300), at(305), at(310)} == {1e-5}


def test_no_warm_up_starts_at_the_peak():
    assert schedule("transnext_base", warmup_epochs=0.0)(0) == 1e-3


@pytest.mark.parametrize("name", ["transnext_tiny", "transxnet_s"])
def test_every_step_equals_timms_schedule(name):
    config = recipe(name)
    optim, steps_per_epoch = config.optim, 7
    theirs = CosineLRScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=optim.lr),
        t_initial=300 * steps_per_epoch,
        lr_min=optim.min_lr,
        warmup_t=int(optim.warmup_epochs) * steps_per_epoch,
        warmup_lr_init=optim.warmup_lr,
        t_in_epochs=False,
    )
    total = config.train.epochs * steps_per_epoch
    for step in range(total):
        theirs.step_update(step)
        expected = theirs.optimizer.param_groups[0]["lr"]
        mine = learning_rate(step, optim, steps_per_epoch=steps_per_epoch, total_steps=total)
        assert mine == pytest.approx(expected, rel=1e-12)


STEPS = 2 * STEPS_PER_EPOCH  # of the demo recipe, were it that long


def over_a_run(*arguments):
    """What holds at the first, the middle and the last step of a run."""
    config = override(recipe("demo"), list(arguments))
    steps = {"steps_per_epoch": STEPS_PER_EPOCH, "total_steps": STEPS}
    return [hyper_at(step, config, **steps) for step in (0, STEPS // 2, STEPS - 1)]


def test_weight_decay_and_drop_path_stay_unless_asked_to_move():
    for hyper in over_a_run():
        assert (hyper.weight_decay, hyper.drop_path, hyper.ema_decay) == (0.05, 1.0, 0.99)


def test_weight_decay_moves_by_a_cosine_to_its_end():
    found = over_a_run("--optim.weight-decay", "0.04", "--optim.weight-decay-end", "0.4")
    expected = pytest.approx([0.04, 0.22, 0.4], abs=1e-5)
    assert [hyper.weight_decay for hyper in found] == expected


@pytest.mark.parametrize("ramp", ["linear", "cosine"])
def test_drop_path_rises_over_the_run(ramp):
    found = over_a_run("--train.drop-path-ramp", ramp)
    assert [hyper.drop_path for hyper in found] == pytest.approx([0, 0.5, 1], abs=1e-3)


def test_the_average_s_decay_warms_up():
    config = override(recipe("demo"), ["--train.ema-warmup"])
    steps = {"steps_per_epoch": STEPS_PER_EPOCH, "total_steps": STEPS}
    found = [hyper_at(step, config, **steps).ema_decay for step in (0, 8, 889, 890, STEPS - 1)]
    assert found == pytest.approx([0.1, 0.5, 890 / 899, 0.99, 0.99])


@pytest.mark.parametrize("name", ["transnext_pico", "timm:test_vit"])
def test_a_share_of_drop_path_is_that_lower_rate(name):
    """Dropped as often, and kept branches scaled as little, as if built with the lower rates."""
    torch.manual_seed(0)
    half, whole = (build(name, img_size=32, num_classes=4, drop_path=rate) for rate in (0.4, 0.8))
    half.load_state_dict(whole.state_dict())
    images, noise = torch.randn(8, 3, 32, 32), torch.rand(whole.num_blocks, 2, 8)
    whole.drop_share = 0.5
    torch.testing.assert_close(whole(images, noise), half(images, noise))
    whole.drop_share = 1.0
    assert not torch.equal(whole(images, noise), half(images, noise))


def test_another_share_compiles_nothing_again():
    model = build("timm:test_vit", img_size=32, num_classes=4, drop_path=0.5)
    compiled = []
    for block in model.blocks():
        if block.residual:
            block.module.forward = torch.compile(
                block.module.forward, backend=lambda graph, _: compiled.append(graph) or graph
            )
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(model.num_blocks, 2, 2)
    model(images, noise)
    graphs = len(compiled)
    for share in (0.25, 0.5):
        model.drop_share = share
        model(images, noise)
    assert len(compiled) == graphs > 0
