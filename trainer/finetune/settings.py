"""The settings of a dense fine-tuning run, for detection and segmentation alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from trainer.config import UserError, flatten
from trainer.manifest import write_atomically


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How the backbone is built around its weights."""

    img_size: int = 800
    """Image side at which TransNeXt's position biases are made before they are interpolated."""
    position_mode: Literal["interpolate", "extrapolate"] = "interpolate"
    """TransNeXt's position biases at other sizes than img_size."""
    drop_path: float = 0.0
    """Stochastic depth rate of the backbone's last block."""
    head_size: Literal["published", "small"] = "published"
    """Widths, layers and samples of the head: small is for small sets and machines."""
    checkpointing: str = "none"
    """Activation checkpointing of the backbone: none, full, selective, or stages such as 1,2."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """AdamW and its schedule."""

    lr: float = 1e-4
    """Peak learning rate of the head."""
    backbone_lr: float = 1.0
    """Factor on it for the backbone."""
    layer_decay: float = 1.0
    """Further factor with every residual block of the backbone away from the head."""
    weight_decay: float = 0.05
    """Decoupled weight decay of what is no norm, nor exempt by the backbone's own recipe."""
    schedule: Literal["step", "poly", "cosine", "constant"] = "step"
    """A tenth at each milestone, (1 - progress) to some power, half a cosine, or nothing."""
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    """Where schedule step lowers the rate, as shares of the training."""
    power: float = 1.0
    """Of schedule poly."""
    warmup_steps: int = 500
    """Length of the linear warm-up."""
    warmup_start: float = 1e-3
    """Share of the rate that the warm-up begins at."""
    clip_grad: float | None = None
    """Largest global gradient norm; unset does not clip."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and how much at a time."""

    epochs: int = 0
    """Passes over the training images; 0 counts in steps."""
    steps: int = 0
    """Optimizer steps; 0 counts in epochs."""
    batch_size: int = 16
    """Images per optimizer step over all processes."""
    accumulate: int = 1
    """Micro-batches that a process splits its share into."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute type of matrix products and activations."""
    seed: int = 0
    """Seed of the head's weights, order, augmentation and drop path."""
    num_workers: int = 4
    """Processes per process that read and augment images; 0 does it in place."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates every epoch, or ten times if steps count."""
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between reports."""
    pictures: int = 4
    """Validation pictures on which predictions are drawn at each evaluation."""


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """What detection and segmentation have in common."""

    backbone: str
    """A run folder, checkpoint, bundle or weight file; a model's name starts untrained."""
    out: str
    """The folder of this fine-tuning; starting the same folder again continues it."""
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def validate(self) -> list[str]:
        """Return every problem that can be seen without the data, each with its remedy."""
        return list(self._problems())

    def _problems(self) -> Iterator[str]:
        train, optim = self.train, self.optim
        if (train.epochs > 0) == (train.steps > 0):
            yield (
                f"train.epochs is {train.epochs} and train.steps {train.steps}: give one of them, "
                "and 0 for the other"
            )
        for name, least in _LEAST.items():
            section, _, item = name.partition(".")
            value = getattr(getattr(self, section), item)
            if value is not None and value < least:
                yield f"{name} is {value}: it must be at least {least}"
        for name in ("optim.lr", "optim.layer_decay"):
            value = getattr(optim, name.partition(".")[2])
            if value <= 0:
                yield f"{name} is {value}: it must be above 0"
        if not 0 <= self.model.drop_path < 1:
            yield f"model.drop_path is {self.model.drop_path}: it must be at least 0 and below 1"

    def share(self, world_size: int) -> int:
        """Return how many images a process takes in one micro-batch.

        Raises:
            UserError: if the batch cannot be shared evenly.
        """
        parts = world_size * self.train.accumulate
        if self.train.batch_size % parts:
            raise UserError(
                f"train.batch_size {self.train.batch_size} does not divide among {world_size} "
                f"processes × train.accumulate {self.train.accumulate}: choose a multiple of "
                f"{parts}"
            )
        return self.train.batch_size // parts


_LEAST = {
    "model.img_size": 1,
    "optim.backbone_lr": 0,
    "optim.weight_decay": 0,
    "optim.warmup_steps": 0,
    "train.epochs": 0,
    "train.steps": 0,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.num_workers": 0,
    "train.eval_every": 0,
    "train.save_every": 1,
    "train.log_every": 1,
    "train.pictures": 0,
}

# What a run may change on its way: how it is watched and fed, not what it computes.
_FREE = {
    *("train.num_workers", "train.eval_every", "train.save_every", "train.log_every"),
    *("train.pictures", "train.accumulate", "model.checkpointing"),
}

D = TypeVar("D", bound=DenseSettings)


def keep_settings(settings: D) -> None:
    """Write OUT/config.json, or make sure that the run there is the same one.

    Raises:
        UserError: if the folder cannot be written or holds another run.
    """
    path = Path(settings.out) / "config.json"
    try:
        if path.exists():
            _compare(path, dict(flatten(settings)))
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(settings), indent=2) + "\n"
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{settings.out} cannot be written: {error.strerror}") from None


def _compare(path: Path, mine: dict[str, Any]) -> None:
    try:
        before = dict(_leaves(json.loads(path.read_text())))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove its folder to start anew") from None
    for name, value in mine.items():
        then = before.get(name)
        if name not in _FREE and then != json.loads(json.dumps(value)):
            raise UserError(
                f"{path.parent} was begun with {name} {then}, not {value}: go on with that, or "
                "give another --out"
            )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
