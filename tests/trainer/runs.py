"""Tiny runs for the trainer's tests: a few steps of a pico model on generated images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from launcher.local import Workers
from launcher.process import Process
from tests.dist import run_distributed
from trainer import manifest
from trainer.config import RunConfig, override
from trainer.loop import Trainer
from trainer.recipes import recipe

TINY = (
    "--data.source", "synthetic",
    "--data.train", "num_samples=120,num_classes=10,size=20",
    "--data.val", "num_samples=50,num_classes=10,size=20",
    "--data.mixup", "0.8", "--data.cutmix", "1.0", "--data.erase-prob", "0.25",
    "--data.crop-scale", "0.2", "1.0",
    "--model.img-size", "16", "--model.drop-path", "0.2",
    "--train.batch-size", "24", "--train.epochs", "4", "--train.ema-decay", "0.9",
    "--optim.warmup-epochs", "1", "--eval.every-epochs", "2", "--eval.batch-size", "24",
    "--checkpoint.every", "5", "--checkpoint.keep-last", "9",
    "--log.every", "1", "--log.images", "0",
)  # fmt: skip

# Runs after one another in one process: each leaves process groups, a dozen threads and up to forty
# open files, of which many systems allow a thousand.
_IN_TURN = 16


def tiny_config(run_dir: Path, *arguments: str) -> RunConfig:
    """Return the demo recipe shrunk to 20 steps of 24 images, with every augmentation on."""
    return override(recipe("demo"), [*TINY, "--run-dir", str(run_dir), *arguments])


def train(rank: int, world_size: int, config: str) -> bool:
    """Run a whole configuration (JSON) as one rank of a process group that exists."""
    return make_trainer(rank, world_size, config).run()


def make_trainer(rank: int, world_size: int, config: str) -> Trainer:
    """Return what train() runs."""
    run_config = RunConfig.from_json(config)
    run_dir = Path(run_config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(config)
    place = Process(
        rank=rank, world_size=world_size, local_rank=rank, node=0,
        address="127.0.0.1", port=0, kind="torchrun",
    )  # fmt: skip
    return Trainer(run_config, place)


def train_named(
    folder: Path, named: dict[str, tuple[int, list[str]]]
) -> dict[str, tuple[dict[int, float], list[float]]]:
    """Train `named` runs, name -> (world size, arguments), each in the folder of its name.

    Those of one world size are trained in turn by the same processes: starting processes takes
    longer than the runs do. Returns the losses by step and the accuracies of each.
    """
    for world_size in sorted({size for size, _ in named.values()}):
        configs = [
            tiny_config(folder / name, *arguments).to_json()
            for name, (size, arguments) in named.items()
            if size == world_size
        ]
        for first in range(0, len(configs), _IN_TURN):
            some = configs[first : first + _IN_TURN]
            timeout = 600 + 60 * len(some)
            assert all(map(all, run_distributed(train_all, world_size, some, timeout=timeout)))
    return {name: (losses(folder / name), accuracies(folder / name)) for name in named}


def train_all(rank: int, world_size: int, configs: list[str]) -> list[bool]:
    """Run several configurations in turn as one rank of a process group that exists."""
    done = []
    for config in configs:
        try:
            done.append(train(rank, world_size, config))
        except BaseException as error:
            error.add_note(f"in the run {RunConfig.from_json(config).run_dir}")
            raise
    return done


def kill_at_a_checkpoint(run_dir: Path, *, num_processes: int) -> None:
    """Start a prepared run and kill its workers as soon as a checkpoint is complete."""
    with Workers(run_dir, num_processes=num_processes) as workers:
        while not manifest.checkpoints(run_dir / "checkpoints"):
            assert workers.running(seconds=0.02), "it ended before it could be killed"
        workers.kill()


def copy_checkpoint(before: Path, after: Path, *, step: int) -> None:
    """Let the run folder `after` go on from the checkpoint that `before` has of a step."""
    source, target = before / "checkpoints", after / "checkpoints"
    shutil.copytree(source / f"step_{step:010d}", target / f"step_{step:010d}")
    shutil.copy(source / "generation", target)


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind of RUN/metrics.jsonl."""
    text = (run_dir / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def losses(run_dir: Path) -> dict[int, float]:
    """Return the loss of every step; of a step that was run twice, the last."""
    return {line["step"]: line["loss"] for line in lines(run_dir, "train")}


def accuracies(run_dir: Path) -> list[float]:
    """Return top-1 of the live and the averaged weights, of every evaluation."""
    return [line[name] for line in lines(run_dir, "eval") for name in ("top1", "ema_top1")]
