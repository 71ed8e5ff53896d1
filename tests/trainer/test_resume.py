"""A run that was killed goes on as if it had not been, on as many processes as it gets next."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from launcher import rundir
from launcher.local import launch
from tests.dist import run_distributed
from tests.trainer.runs import (
    copy_checkpoint,
    kill_at_a_checkpoint,
    lines,
    losses,
    tiny_config,
    train,
)
from trainer import manifest
from trainer.checkpoint import Checkpointer, State
from trainer.config import RunConfig


@pytest.mark.slow
def test_after_sigkill_the_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = rundir.prepare(tiny_config(tmp_path / "whole"))
    assert launch(whole, num_processes=2) == 0
    killed = rundir.prepare(tiny_config(tmp_path / "killed"))
    kill_at_a_checkpoint(killed, num_processes=2)
    assert launch(killed, num_processes=2) == 0

    starts = [line["step"] for line in lines(killed, "start")]
    assert starts[0] == 0
    assert starts[1] in (5, 10, 15), "it went on from a checkpoint in the middle"
    assert losses(killed) == losses(whole)
    assert _final(killed).keys() == _final(whole).keys()
    for name, tensor in _final(whole).items():  # weights, moments, buffers and average
        assert torch.equal(_final(killed)[name], tensor), name


@pytest.mark.slow
def test_on_other_processes_the_losses_stay(tmp_path: Path) -> None:
    # TransXNet's BatchNorm buffers travel too; 25 steps, five an epoch: epochs end on the way.
    arguments = ["--model.name", "transxnet_pico", "--train.epochs", "5"]
    arguments += ["--eval.every-epochs", "5"]
    before = tmp_path / "before"
    config = tiny_config(before, *arguments, "--checkpoint.every", "4")
    run_distributed(train, 2, config.to_json(), timeout=300)
    after = tmp_path / "on three"
    copy_checkpoint(before, after, step=4)
    arguments += ["--backend.name", "fsdp", "--checkpoint.every", "25"]
    run_distributed(train, 3, tiny_config(after, *arguments).to_json(), timeout=300)
    assert sorted(losses(after)) == list(range(5, 26))
    expected = {step: loss for step, loss in losses(before).items() if step > 4}
    assert losses(after) == pytest.approx(expected, abs=1e-4)
    shown = [(line["epoch"], line["shown"]) for line in lines(after, "audit")]
    assert shown == [(epoch, 120) for epoch in range(5)]


def test_a_checkpoint_is_never_ahead_of_the_log(tmp_path: Path) -> None:
    """Whoever is killed right after a save has reported all the steps that are in it."""
    config = tiny_config(tmp_path / "run", "--train.epochs", "2", "--eval.every-epochs", "2")
    (reported,) = run_distributed(_reported_at_saves, 1, config.to_json())
    assert reported == [(5, 5), (10, 10)]


def _reported_at_saves(rank: int, world_size: int, config: str) -> list[tuple[int, int]]:
    """Return the last step reported and the step saved, at every save of a run."""
    run_dir, found = Path(RunConfig.from_json(config).run_dir), []
    save = Checkpointer.save

    def note(self: Checkpointer, state: State, step: int, *rest: Any, **options: Any) -> None:
        found.append((max(losses(run_dir)), step))
        save(self, state, step, *rest, **options)

    with mock.patch.object(Checkpointer, "save", note):
        train(rank, world_size, config)
    return found


@cache
def _final(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return what the last checkpoint holds, shard by shard."""
    newest = manifest.checkpoints(run_dir / "checkpoints")[-1]
    shards = sorted(newest.glob("*.safetensors"))
    return {f"{path.name} {name}": t for path in shards for name, t in load_file(path).items()}
