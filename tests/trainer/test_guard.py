"""The guard: a loss that jumps is left out, undone or ends the run, and the record tells of it."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.dist import run_distributed
from tests.trainer.runs import lines, tiny_config, train
from trainer import loop
from trainer.guard import BadNumericsError, Guard
from trainer.sections import GuardConfig
from trainer.task import Loss

JUMP = 18
"""The step, from 1, whose loss is made to jump."""
SETTINGS = (
    "--data.train", "num_samples=576,num_classes=10,size=20", "--train.epochs", "1",
    "--optim.warmup-epochs", "0.1", "--checkpoint.every", "4", "--guard.spike", "10",
    "--backend.name", "fsdp", "--log.every", "2",
)  # fmt: skip


def train_with_a_jump(rank, world_size, config):
    """Train as rank of two; return what ended it, if it was not the last step."""
    right, calls = loop.make_task, 0

    def make_task(*arguments):
        task = right(*arguments)

        def jumping(*inputs):
            nonlocal calls
            calls += 1
            loss = task(*inputs)
            by = 9.0 if calls == JUMP else 1.0
            return Loss(loss.total * by, {name: part * by for name, part in loss.parts.items()})

        return jumping

    with mock.patch.object(loop, "make_task", make_task):
        try:
            assert train(rank, world_size, config)
        except BadNumericsError as error:
            return str(error)
    return None


def make_guard(**settings):
    return Guard(GuardConfig(**settings), Path(), torch.device("cpu"), every=1, computes={})


def judge_all(rank, world_size, losses, spike):
    """Judge a series of losses; return which are spikes, and the limits."""
    guard = make_guard(spike=spike)
    found = [guard.judge(torch.tensor(loss + rank)) for loss in losses]
    return [[v["spike"].item(), v["loss_limit"].nan_to_num(-1.0).item()] for v in found]


def test_a_loss_far_above_those_before_is_a_spike_on_every_rank():
    series = [2 - 0.01 * step + 0.02 * (-1) ** step for step in range(30)] + [3.0, 1.7, math.inf]
    first, second = run_distributed(judge_all, 2, series, 8.0)
    assert first == second
    assert [bool(spike) for spike, _ in first] == [False] * 30 + [True, False, True]
    # Over 2 ranks the mean is half a unit above rank 0's: the limit is one of means.
    assert 2.0 < first[30][1] < 3.5


def judge_with_a_restart(rank, world_size, losses, settings, after):
    """Judge losses, the last ones by a guard that goes on from what the first one saved."""
    alone, first, second = (make_guard(**settings) for _ in range(3))
    expected = [alone.judge(torch.tensor(loss)) for loss in losses]
    for loss in losses[:after]:
        first.judge(torch.tensor(loss))
    second.take(json.loads(json.dumps(first.to_dict())))
    found = [second.judge(torch.tensor(loss)) for loss in losses[after:]]
    limits = [[v["spike"].item(), v["loss_limit"].item()] for v in expected[after:]]
    return [limits, [[v["spike"].item(), v["loss_limit"].item()] for v in found]]


@pytest.mark.parametrize(("window", "after"), [(128, 12), (128, 27), (20, 33), (8, 30)])
def test_a_guard_that_goes_on_judges_as_if_it_had_never_stopped(window, after):
    series = [2 - 0.01 * step + 0.02 * (-1) ** step for step in range(40)]
    series[25], series[36] = 9.0, 8.0
    settings = {"spike": 8.0, "window": window}
    [[expected, found]] = run_distributed(judge_with_a_restart, 1, series, settings, after)
    assert str(found) == str(expected)  # limits may be NaN at first
    assert [spike for spike, _ in found][36 - after] == 1.0


def leave_it(rank, world_size):
    guard = make_guard()
    verdict = guard.judge(torch.tensor(3.0))
    return [verdict, guard.keep(verdict)]


def test_without_a_limit_nothing_is_judged():
    assert run_distributed(leave_it, 1) == [[{}, None]]


@pytest.mark.slow
def test_a_jump_is_left_out_undone_or_ends_the_run(tmp_path):
    ended = {}
    for action in ("skip", "rollback", "abort"):
        config = tiny_config(tmp_path / action, *SETTINGS, "--guard.action", action)
        ended[action] = run_distributed(train_with_a_jump, 2, config.to_json())
        [spike] = lines(tmp_path / action, "spike")
        assert spike["step"] == JUMP
        assert spike["loss"] > 3 * spike["limit"]
        record = json.loads((tmp_path / action / "logs" / "steps_00001.json").read_text())
        assert "the loss jumped" in record["why"]
        assert record["computes"] == {"precision": "fp32", "compile": False}
        step = record["steps"][JUMP - 1]
        assert (step["step"], step["samples"], step["spike"]) == (JUMP, 24 * (JUMP - 1), 1.0)
        assert len(step["ids"][0]) == 12
        assert step["grad_norm_stage3"] > 0
    left_out = {line["step"]: line["skipped"] for line in lines(tmp_path / "skip", "train")}
    assert left_out == {step: 0.5 * (step == JUMP) for step in range(2, 25, 2)}
    assert ended["skip"] == ended["rollback"] == [None, None]
    [rollback] = lines(tmp_path / "rollback", "rollback")
    assert (rollback["step"], rollback["spike"], rollback["back_to"]) == (JUMP + 2, JUMP, 16)
    assert [end["step"] for end in lines(tmp_path / "rollback", "end")] == [24]
    assert all("after 0 rollbacks: look at it with `foveate replay" in e for e in ended["abort"])
