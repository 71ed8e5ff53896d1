"""Replay: make one step of a run again, in one process, and say where its numbers went bad.

The steps from the newest checkpoint before it are made again first, so that it starts from the
weights it had; data, augmentation and drop path are functions of the step. Nothing is written to
the run folder. A step after an update that `guard.action skip` left out starts from other weights
than it had, unless a checkpoint lies in between.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from data.base import DataError
from launcher.process import Process
from models.base import ModelError

from . import manifest
from .config import RunConfig, UserError, override
from .loop import Trainer
from .probe import Probe

_NAMED = 5  # tensors with the largest values, where all are finite


def replay(config: RunConfig, step: int, scratch: Path) -> tuple[Probe, dict[str, float]]:
    """Make `step` (from 1) again, with `scratch` as run folder; return what was seen, and values.

    Raises:
        UserError: if the run has no such step.
    """
    _link_checkpoints(Path(config.run_dir), step, scratch)
    alone = Process(
        rank=0, world_size=1, local_rank=0, node=0, address="127.0.0.1", port=0, kind="single"
    )
    trainer = Trainer(_alone(config, scratch), alone)
    if not trainer.state.step < step <= trainer.total_steps:
        raise UserError(f"step {step} is not one of the run's {trainer.total_steps}")
    accumulate, probe = trainer.config.train.accumulate, Probe()
    with closing(
        trainer.pipeline.batches(trainer.state.cursor, trainer.engine.backend.data_shard)
    ) as data:
        while trainer.state.step < step - 1:
            trainer.advance(list(islice(data, accumulate)))
            print(f"step {trainer.state.step} made again", flush=True)
        with probe.watching(trainer.engine.bare_model):
            values = trainer.advance(list(islice(data, accumulate)))
    for name, tensor in trainer.engine.backend.local_tensors().items():
        probe.look(f"{name} after the step", tensor)
    trainer.watchdog.close()
    return probe, {name: value.item() for name, value in values.items()}


def _alone(config: RunConfig, scratch: Path) -> RunConfig:
    """Return the configuration of a run that leaves no trace, and whose modules can be watched."""
    return replace(
        config,
        run_dir=str(scratch),
        backend=replace(config.backend, offload_dir=None),
        memory=replace(config.memory, compile=False),
        log=replace(config.log, every=10**9),
        guard=replace(config.guard, hang_seconds=0.0),
    )


def _link_checkpoints(run_dir: Path, step: int, scratch: Path) -> None:
    """Let `scratch` have the checkpoints of a run that lie before `step`."""
    (scratch / "checkpoints").mkdir(parents=True)
    for folder in manifest.checkpoints(run_dir / "checkpoints"):
        if manifest.step_of(folder) < step:
            (scratch / "checkpoints" / folder.name).symlink_to(folder.resolve())


def recorded_loss(run_dir: Path, step: int) -> float | None:
    """Return the loss of a step over all ranks as the run's guard wrote it down, if it did."""
    parts = [
        float(entry["loss"])
        for path in sorted((run_dir / "logs").glob("steps_*.json"))
        for entry in json.loads(path.read_text())["steps"]
        if entry["step"] == step and "loss" in entry
    ]
    return sum(parts) / len(parts) if parts else None


def main() -> int:
    """Replay a step and print what was seen; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="foveate replay",
        description="Make one step of a run again, in one process, and say where it went bad.",
        epilog="Other settings may follow, such as --backend.name fsdp or --train.accumulate 8.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--step", type=int, required=True, help="the step, from 1")
    arguments, overrides = parser.parse_known_args()
    try:
        config = replace(RunConfig.read(arguments.run / "config.json"), run_dir=str(arguments.run))
        if overrides:
            config = override(config, overrides)
        with tempfile.TemporaryDirectory(prefix="foveate-replay-") as scratch:
            probe, values = replay(config, arguments.step, Path(scratch))
        _report(probe, values, arguments.run, arguments.step)
    except (UserError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(probe: Probe, values: dict[str, float], run_dir: Path, step: int) -> None:
    recorded = recorded_loss(run_dir, step)
    said = "not recorded" if recorded is None else f"recorded {recorded:.6g}"
    print(f"step {step}: loss {values['loss']:.6g} ({said}), grad_norm {values['grad_norm']:.6g}")
    if (bad := probe.first_bad()) is not None:
        print(f"the first tensor that went bad is the {bad}")
        return
    print("all tensors are finite; those of the largest values:")
    for look in probe.largest(_NAMED):
        print(f"  {look}")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort a process that tears down normally
