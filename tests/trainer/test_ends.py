"""Ends that are not the usual one: a stop within the last evaluation, and numbers gone bad."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher.process import Process
from tests.dist import run_distributed
from tests.trainer.runs import lines, tiny_config
from trainer import manifest
from trainer.config import RunConfig
from trainer.guard import BadNumericsError
from trainer.loop import Trainer

SHORT = ("--backend.name", "ddp", "--train.epochs", "1", "--eval.every-epochs", "100")
DIVERGING = ("--optim.lr", "1e30", "--optim.warmup-epochs", "0", "--optim.clip-grad", "None")


class Alarm:
    """A source that asks for a stop as soon as it is read: the evaluation is under way."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, id):
        os.kill(os.getpid(), signal.SIGTERM)
        return self.source.read(id)


def start(config):
    run_config = RunConfig.from_json(config)
    Path(run_config.run_dir).mkdir(exist_ok=True)
    return Trainer(run_config, Process.from_environment({}))


def unusual_ends(rank, world_size, stopped, *diverging):
    """Start one run three times, the first with an alarm; return what each start came to."""
    trainer = start(stopped)
    trainer.evaluator.source = Alarm(trainer.evaluator.source)
    complete = [trainer.run(), start(stopped).run(), start(stopped).run()]
    return {"complete": complete, "messages": [bad_numerics(start(c)) for c in diverging]}


def bad_numerics(trainer):
    try:
        trainer.run()
    except BadNumericsError as error:
        assert trainer.metrics.sinks.jsonl.closed, "what was reported is not on the disk yet"
        return str(error)
    return "none"


@pytest.mark.slow
def test_a_lost_evaluation_is_made_up_for_and_bad_numerics_are_told(tmp_path):
    configs = [tiny_config(tmp_path / "stopped", *SHORT)]
    for every in ("2", "4"):
        arguments = (*SHORT, *DIVERGING, "--log.every", every)
        configs.append(tiny_config(tmp_path / f"diverging {every}", *arguments))
    (answer,) = run_distributed(unusual_ends, 1, *(config.to_json() for config in configs))

    assert answer["complete"] == [False, True, True]
    stopped = tmp_path / "stopped"
    assert [line["step"] for line in lines(stopped, "start")] == [0, 5, 5]
    assert [line["step"] for line in lines(stopped, "stop")] == [5]
    assert [line["step"] for line in lines(stopped, "eval")] == [5], "by the second start alone"
    (checkpoint,) = manifest.checkpoints(stopped / "checkpoints")
    found = manifest.read(checkpoint)
    assert found.record["state"]["evaluated_step"] == found.record["state"]["best_step"] == 5
    assert found.generation == 2, "the third start had nothing to save"

    # Of five steps the first is learnt from. The third and fourth fill an interval of two; where
    # intervals have four, the last one is the fifth step alone.
    for message, step in zip(answer["messages"], (4, 5), strict=True):
        assert f"not finite for a whole log interval up to step {step}: lower optim.lr" in message
