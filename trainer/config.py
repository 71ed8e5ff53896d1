"""RunConfig: everything that decides what a run computes, as frozen dataclasses.

Torch-free, so that a login node can check a run. A value reaches the run in exactly one way:
recipe function -> command-line overrides -> validate() -> config.json -> worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .typed_json import OtherFields, typed


class UserError(Exception):
    """A mistake that its user can mend: one message, exit code 2, no traceback."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network: a name from the model registry and what the registry's build() takes."""

    name: str = "transnext_tiny"
    """A name in the model registry, such as transnext_base."""
    img_size: int = 224
    """Side of the square training images, in pixels."""
    pretrain_size: int | None = None
    """Image side at which position biases were trained; unset means img_size."""
    fixed_pool_size: int | None = None
    """Side of the pooled key grid at any image size (TransNeXt's linear mode)."""
    layer_scale: float | None = None
    """Initial gain of TransNeXt's residual branches (CaiT, arXiv 2103.17239); unset has none."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; earlier blocks rise to it linearly."""
    num_classes: int = 1000
    """Outputs of the classifier."""

    @property
    def squash(self) -> bool:
        """Whether evaluation warps the whole image to the square instead of cropping it."""
        return self.img_size >= 384


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are augmented."""

    source: Literal["webdataset", "folder", "synthetic"] = "webdataset"
    """Storage: indexed tar shards, one folder per class, or generated images."""
    train: str = "datasets/imagenet/train"
    """Folder of the training split; synthetic takes num_samples=256,num_classes=10,size=32."""
    val: str = "datasets/imagenet/val"
    """Folder of the evaluation split; synthetic as above."""
    num_workers: int = 8
    """Decoding threads per process."""
    prefetch: int = 4
    """Micro-batches prepared ahead."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's share of the image area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the random crop's aspect ratio."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """Resampling of training crops; random draws one of the two per image."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = None
    """Policy in timm's notation: rand-m9-mstd0.5-inc1, original, v0r, 3a, augmix-m3 and so on."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter; of policies, 3a alone keeps it."""
    repeats: int = 1
    """Differently augmented copies of an image in an epoch that shows 1/repeats of the images."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    erase_prob: float = 0.0
    """Probability of random erasing (pixel mode)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means of images in 0..1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations of images in 0..1."""

    @property
    def mix_group(self) -> int:
        """Neighbouring images that are mixed with one another: pairs, or each by itself."""
        return 2 if self.mixup > 0 or self.cutmix > 0 else 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which batches and precision."""

    epochs: int = 300
    """Passes over the training images, cool-down included."""
    batch_size: int = 1024
    """Images per optimizer step over all processes."""
    accumulate: int = 1
    """Micro-batches that one step is split into."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type of matrix products and activations; weights and statistics stay fp32."""
    label_smoothing: float = 0.1
    """Probability mass spread over all classes."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function in the loss (PaLM, arXiv 2204.02311)."""
    ema_decay: float = 0.0
    """Decay per step of the weights' moving average; 0 is off."""
    seed: int = 0
    """Seed of initial weights, order, augmentation and drop path."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (https://arxiv.org/abs/1711.05101) and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine and during cool-down."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    warmup_epochs: float = 5.0
    """Length of the linear warm-up."""
    cooldown_epochs: int = 0
    """Last epochs, run at min_lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.05
    """Decoupled weight decay of the parameters that the model does not exempt."""
    clip_grad: float | None = None
    """Largest global gradient norm; unset does not clip."""


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """How the model is spread over processes."""

    name: Literal["ddp", "fsdp"] = "ddp"
    """ddp replicates the training state, fsdp (FSDP2) shards it over all processes."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory against time."""

    checkpointing: str = "none"
    """Activation checkpointing: none, full, or the stages to recompute, such as 1,2."""
    compile: bool = False
    """Compile every block with torch.compile."""

    def stages(self) -> tuple[int, ...]:
        """Return the stages (1-4) whose blocks are recomputed in the backward pass.

        Raises:
            ValueError: if `checkpointing` is neither none, full nor a list of stages.
        """
        if self.checkpointing in ("none", "full"):
            return (1, 2, 3, 4) if self.checkpointing == "full" else ()
        if not re.fullmatch(r"[1-4](,[1-4])*", self.checkpointing):
            raise ValueError(self.checkpointing)
        return tuple(sorted({int(stage) for stage in self.checkpointing.split(",")}))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the whole evaluation split."""

    every_epochs: float = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    batch_size: int = 1024
    """Images per forward pass over all processes."""
    crop_pct: float = 0.875
    """Side of the centre crop as a share of the resized image (from 384 pixels on, none is cut)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 1250
    """Steps between checkpoints."""
    keep_last: int = 3
    """Newest checkpoints to keep."""
    keep_best: bool = True
    """Keep the checkpoint of the best evaluation too."""
    async_save: bool = True
    """Write in the background while training goes on."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported, and how often."""

    every: int = 50
    """Steps between log lines."""
    images: int = 16
    """Augmented inputs shown in TensorBoard at each start; 0 shows none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. See `trainer.recipes` for the published ones."""

    recipe: str
    """The recipe this configuration started from."""
    run_dir: str
    """The run folder; starting the same folder again continues the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def validate(self) -> list[str]:
        """Return every problem that can be seen without the data, each with its remedy."""
        return [*_range_problems(self), *_relation_problems(self)]

    def to_json(self) -> str:
        """Return the configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "config.json") -> RunConfig:
        """Read what to_json() wrote.

        Raises:
            UserError: if the text is not JSON or does not fit RunConfig, naming `where`.
        """
        try:
            return typed(cls, json.loads(text))
        except OtherFields as error:
            code = shlex.quote(str(Path(where).absolute().parent / "code"))
            raise UserError(
                f"{where} was written by another version of Foveate ({error}): go on with the "
                f"run's own code, by PYTHONPATH={code} PYTHONSAFEPATH=1 python -m launcher in "
                "place of foveate"
            ) from None
        except ValueError as error:
            raise UserError(f"{where} is not a run configuration: {error}") from None

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        """Read a run's config.json.

        Raises:
            UserError: if it cannot be read.
        """
        try:
            return cls.from_json(path.read_text(), where=str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None


_POSITIVE = (
    "model.img_size", "model.num_classes", "model.pretrain_size", "model.fixed_pool_size",
    "model.layer_scale", "data.num_workers", "data.prefetch", "data.repeats", "train.epochs",
    "train.batch_size", "train.accumulate", "optim.lr", "optim.eps", "optim.clip_grad",
    "eval.every_epochs", "eval.batch_size", "eval.crop_pct", "checkpoint.every",
    "checkpoint.keep_last", "log.every",
)  # fmt: skip
_NOT_NEGATIVE = (
    "data.mixup", "data.cutmix", "data.color_jitter", "optim.min_lr", "optim.warmup_lr",
    "optim.warmup_epochs", "optim.cooldown_epochs", "optim.weight_decay", "log.images",
    "train.seed", "train.z_loss",
)  # fmt: skip
_SHARE = (
    "model.drop_path", "data.hflip", "data.mix_switch_prob", "data.erase_prob",
    "train.label_smoothing", "train.ema_decay", "eval.crop_pct",
)  # fmt: skip


def _range_problems(config: RunConfig) -> Iterator[str]:
    for name, value in flatten(config):
        must = _must(name, value)
        if must is not None:
            yield f"{name} is {value}: it must {must}"


def _must(name: str, value: Any) -> str | None:
    """Return what a value has to do that it does not, or None."""
    if not _is_finite(value):
        return "be finite"
    if name in _POSITIVE and value is not None and value <= 0:
        return "be above 0"
    if name in _NOT_NEGATIVE and value < 0:
        return "not be negative"
    if name in _SHARE and not 0 <= value <= 1:
        return "lie in 0..1"
    return None


def _is_finite(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _relation_problems(config: RunConfig) -> Iterator[str]:
    optim, train, data = config.optim, config.train, config.data
    if optim.warmup_epochs + optim.cooldown_epochs > train.epochs:
        yield (
            f"optim.warmup_epochs {optim.warmup_epochs} and optim.cooldown_epochs "
            f"{optim.cooldown_epochs} do not fit in train.epochs {train.epochs}"
        )
    if optim.cooldown_epochs == train.epochs:
        yield (
            f"optim.cooldown_epochs is {optim.cooldown_epochs}, all of train.epochs: leave at "
            "least one for the schedule"
        )
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas is {optim.betas}: both must be at least 0 and below 1"
    if not all(deviation > 0 for deviation in data.std):
        yield f"data.std is {data.std}: deviations must be above 0"
    if train.batch_size % (data.mix_group * train.accumulate):
        yield (
            f"train.batch_size {train.batch_size} is not a multiple of train.accumulate "
            f"{train.accumulate} × {data.mix_group}, the images that are mixed with one another"
        )
    for name, (low, high) in (("crop_scale", data.crop_scale), ("crop_ratio", data.crop_ratio)):
        if not 0 < low <= high:
            yield f"data.{name} is {low} {high}: give two positive numbers, the smaller first"
    try:
        config.memory.stages()
    except ValueError:
        yield (
            f"memory.checkpointing is {config.memory.checkpointing!r}: give none, full, or stages "
            "such as 1,2"
        )


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every setting of a configuration, in order."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def nearest(name: str, names: Sequence[str], *, prefix: str = "") -> str:
    """Return `; did you mean X?` for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def override(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Apply command-line overrides such as `--optim.lr 2e-3` and validate the result.

    Raises:
        UserError: for an unknown name (with the nearest known one), a value of the wrong type,
            or values that do not fit together (all problems in one message).
    """
    names = [name.replace("_", "-") for name, _ in flatten(config) if name != "recipe"]
    for argument in arguments:
        option = argument.removeprefix("--").split("=")[0].replace("_", "-")
        if argument.startswith("--") and option not in names and not _is_switch(option, names):
            raise UserError(f"unknown option --{option}{nearest(option, names, prefix='--')}")
    result = _parse(config, arguments)
    problems = result.validate()
    if problems:
        raise UserError("; ".join(problems))
    return result


def _is_switch(option: str, names: Sequence[str]) -> bool:
    section, dot, name = option.rpartition(".")
    return name.startswith("no-") and f"{section}{dot}{name[3:]}" in names


def _parse(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    import tyro  # only needed where somebody typed an override: it costs a third of a second

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                RunConfig, default=config, args=list(arguments), prog="foveate pretrain RECIPE"
            )
    except SystemExit:
        # tyro draws a box: its second part is the message, the others are a title and hints.
        message = re.split(r"[─-╿]{4,}", said.getvalue())[1]
        raise UserError(" ".join(message.replace("│", " ").split())) from None
