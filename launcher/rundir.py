"""Run folders: the exact code, configuration and environment of a run.

A folder appears whole or not at all, and belongs to one computation for good: starting it again
continues that computation with the code frozen at its first start, or is refused.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path

from trainer.config import RunConfig, UserError, flatten
from trainer.sections import DataConfig, DistillConfig

from .process import check_not_stopped

PACKAGES = ("launcher", "trainer", "models", "data")
CODE = Path(__file__).resolve().parents[1]
"""The folder that holds the packages this process runs."""

# What may change between two starts of a run: how it is computed, reported and saved, and where
# its data lie (the checkpoint knows their fingerprint), but not what is computed.
_FREE = (
    "run_dir", "backend.", "memory.", "log.", "guard.", "checkpoint.", "cluster.",
    "eval.every_epochs", "eval.batch_size",
    "data.source", "data.train", "data.val", "data.allow_unmixed", "data.max_bad",
    "data.cache_dir", "data.cache_gb",
    "data.num_workers", "data.prefetch",
    "train.accumulate", "train.microbatch", "train.deterministic",
)  # fmt: skip


def prepare(config: RunConfig) -> Path:
    """Create the run folder of `config`, or check that it may continue; return its path.

    The configuration is written with absolute paths, so that the run does not depend on the
    folder it is started from.

    Raises:
        UserError: if the folder holds another run or something else, or cannot be written.
    """
    config = absolute(config)
    path = Path(config.run_dir)
    try:
        if not _holds_anything(path):
            _create(path, config)
        _continue(path, config)
    except OSError as error:
        # Copying a tree goes on after an error and reports them all: (source, target, why).
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise UserError(
            f"cannot write the run folder {path}: {why}; mend that or give another --run-dir"
        ) from error
    return path


def absolute(config: RunConfig) -> RunConfig:
    """Return the configuration with absolute paths; URLs and counts of images stay as they are."""
    return dataclasses.replace(
        config,
        run_dir=os.path.abspath(config.run_dir),
        data=_absolute_data(config.data),
        distill=_absolute_distill(config.distill),
    )


def _absolute_data(data: DataConfig) -> DataConfig:
    if data.cache_dir is not None:
        data = dataclasses.replace(data, cache_dir=os.path.abspath(data.cache_dir))
    if data.source == "synthetic":
        return data
    train, val = (p if "://" in p else os.path.abspath(p) for p in (data.train, data.val))
    return dataclasses.replace(data, train=train, val=val)


def _absolute_distill(distill: DistillConfig) -> DistillConfig:
    teacher, weights = distill.teacher, distill.weights
    if teacher is not None and weights is None:  # a folder: a model's name comes with weights
        teacher = os.path.abspath(teacher)
    if weights is not None:
        weights = os.path.abspath(weights)
    return dataclasses.replace(distill, teacher=teacher, weights=weights)


def _holds_anything(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _create(path: Path, config: RunConfig) -> None:
    """Build the folder beside its place and move it there, unless another start was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        (beside / "logs").mkdir(parents=True)
        for package in PACKAGES:
            shutil.copytree(
                CODE / package,
                beside / "code" / package,
                ignore=shutil.ignore_patterns("__pycache__", "*.py[cod]", ".*"),
            )
        (beside / "environment.txt").write_text(_environment())
        (beside / "config.json").write_text(config.to_json())
        beside.rename(path)
    except OSError:
        if not (path / "config.json").exists():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _continue(path: Path, config: RunConfig) -> None:
    file = path / "config.json"
    if not file.is_file() or not (path / "code").is_dir():
        raise UserError(
            f"{path} is not a run folder and not empty: give another --run-dir, or remove it"
        )
    check_not_stopped(path)
    changed = conflicts(RunConfig.read(file), config)
    if changed:
        raise UserError(
            f"{path} holds another run ({'; '.join(changed)}): give another --run-dir, or remove "
            "the folder to start anew"
        )
    beside = file.with_name(f".config.json.{uuid.uuid4().hex}")
    try:
        beside.write_text(config.to_json())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def conflicts(old: RunConfig, new: RunConfig) -> list[str]:
    """Return `name is old, not new` for every setting that a run cannot change on its way."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [
        f"{name} is {before[name]}, not {value}"
        for name, value in after.items()
        if before[name] != value and not name.startswith(_FREE)
    ]


def _environment() -> str:
    """Describe the Python, the machine, the code's commit and the installed packages."""
    found = {item.name: item.version for item in metadata.distributions()}
    return "\n".join(
        [
            f"python {platform.python_version()} {sys.executable}",
            f"platform {platform.platform()}",
            f"commit {_commit()}",
            *(f"{name}=={found[name]}" for name in sorted(found, key=str.lower)),
            "",
        ]
    )


def _commit() -> str:
    """Return the commit of the code, with + if files differ from it, or none."""
    head, top, status = (
        _git(*arguments)
        for arguments in (("rev-parse", "HEAD"), ("rev-parse", "--show-toplevel"), ("status", "-s"))
    )
    # The code may be installed in a folder that lies inside somebody else's repository.
    if not head or not top or Path(top) != CODE:
        return "none"
    return f"{head}+" if status else head


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=CODE, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
