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
from typing import Any, Protocol, TypeVar

from .capabilities import conflicts, world_conflicts
from .sections import (
    BackendConfig,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from .typed_json import OtherFields, typed
from .zero_config import zero_config


class UserError(Exception):
    """A mistake that its user can mend: one message, exit code 2, no traceback."""


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
    distill: DistillConfig = field(default_factory=DistillConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def validate(self) -> list[str]:
        """Return every problem that can be seen without the data, each with its remedy."""
        return [*_range_problems(self), *_relation_problems(self), *conflicts(self)]

    def check_world(self, world_size: int) -> None:
        """Make sure that a valid configuration can run on so many processes.

        Raises:
            UserError: naming every problem.
        """
        problems = list(world_conflicts(self, world_size))
        if problems:
            raise UserError("; ".join(problems))

    def describe(self) -> str:
        """Return to_json() and, in `deepspeed`, the configuration that DeepSpeed is given."""
        found = dataclasses.asdict(self)
        if self.backend.zero_stage:
            found["deepspeed"] = zero_config(self)
        return json.dumps(found, indent=2) + "\n"

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
    "model.layer_scale", "data.num_workers", "data.prefetch", "data.repeats", "data.lanes",
    "data.cache_gb", "data.window", "train.epochs", "train.batch_size",
    "train.accumulate", "optim.lr", "optim.eps", "optim.clip_grad", "optim.layer_decay",
    "distill.temperature",
    "eval.every_epochs", "eval.batch_size", "eval.crop_pct", "checkpoint.every",
    "checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.grace", "log.every",
    "guard.window", "guard.record", "backend.replicas",
)  # fmt: skip
_NOT_NEGATIVE = (
    "data.mixup", "data.cutmix", "data.color_jitter", "optim.min_lr", "optim.warmup_lr",
    "optim.warmup_epochs", "optim.cooldown_epochs", "optim.weight_decay", "log.images",
    "train.seed", "train.z_loss", "guard.spike", "guard.max_rollbacks", "guard.hang_seconds",
    "backend.prefetch", "optim.weight_decay_end",
)  # fmt: skip
_SHARE = (
    "model.drop_path", "data.hflip", "data.mix_switch_prob", "data.erase_prob", "data.max_bad",
    "data.color_jitter_prob", "data.grayscale_prob", "data.gaussian_blur_prob",
    "data.solarize_prob",
    "train.label_smoothing", "train.ema_decay", "eval.crop_pct",
    "optim.momentum", "optim.layer_decay", "distill.weight",
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
    if name in _NOT_NEGATIVE and value is not None and value < 0:
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
    if not 0 <= data.hue_jitter <= 0.5:
        yield f"data.hue_jitter is {data.hue_jitter}: it must lie in 0..0.5, half the circle"
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
    local_dir = config.checkpoint.local_dir
    if local_dir is not None and not Path(local_dir).is_absolute():
        yield f"checkpoint.local_dir is {local_dir}: give an absolute path, the same on each node"
    if data.source == "ffcv_native":
        yield from _beyond_ffcv(config)
    try:
        train.image_sides()
    except ValueError:
        yield (
            f"train.progressive is {train.progressive!r}: give epochs and image sides, from epoch "
            "0 on, such as 0:128,100:176,200:224"
        )
    try:
        config.memory.stages()
    except ValueError:
        yield (
            f"memory.checkpointing is {config.memory.checkpointing!r}: give none, full, selective, "
            "or stages such as 1,2"
        )
    try:
        config.backend.reshard_after_forward()
    except ValueError:
        yield (
            f"backend.reshard is {config.backend.reshard!r}: give yes, no, or how many processes, "
            "from 2 on"
        )


def _beyond_ffcv(config: RunConfig) -> Iterator[str]:
    """What FFCV's own loader has not got."""
    data, train = config.data, config.train
    wanted = {
        "data.order stream": data.order == "stream",
        "data.auto_augment": data.auto_augment is not None,
        "data.repeats": data.repeats > 1,
        "train.accumulate": train.accumulate > 1,
        "train.microbatch auto": train.microbatch == "auto",
        "train.progressive": train.progressive is not None,
    }
    named = ", ".join(name for name, is_wanted in wanted.items() if is_wanted)
    if named:
        yield f"data.source ffcv_native knows no {named}: leave them out, or use data.source ffcv"


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


class Settings(Protocol):
    """A frozen dataclass, perhaps of dataclasses, that knows what is wrong with its values."""

    def validate(self) -> list[str]:
        """Return every problem as one sentence that names the setting, its value and a remedy."""
        ...


C = TypeVar("C", bound=Settings)


def override(config: C, arguments: Sequence[str]) -> C:
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


def _parse(config: C, arguments: Sequence[str]) -> C:
    if not arguments:
        return config
    import tyro  # only needed where somebody typed an override: it costs a third of a second

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(config), default=config, args=list(arguments))
    except SystemExit:
        # tyro draws a box: its second part is the message, the others are a title and hints.
        message = re.split(r"[─-╿]{4,}", said.getvalue())[1]
        raise UserError(" ".join(message.replace("│", " ").split())) from None
