"""The Python that Slurm's tasks run: this process's own, or that of a container image."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config import RunConfig


def python(image: str, folders: Sequence[str]) -> list[str]:
    """Return what stands between srun's options and the arguments of Python.

    `image` is an Apptainer file (.sif), whatever Slurm's Pyxis plugin takes, or empty for no
    container. It sees `folders`, and brings its own Python.
    """
    if not image:
        return [sys.executable]
    if image.endswith(".sif"):
        binds = [f"--bind={folder}" for folder in folders]
        return ["apptainer", "exec", "--nv", *binds, image, "python3"]
    inside = ",".join(f"{folder}:{folder}" for folder in folders)
    return [f"--container-image={image}", f"--container-mounts={inside}", "python3"]


def folders(config: RunConfig, run_dir: Path) -> list[str]:
    """Return the folders and files that the workers of a run read or write."""
    data, distill = config.data, config.distill
    named = [data.train, data.val] if data.source != "synthetic" else []
    named += filter(None, map(_shards, named))
    named += filter(None, [data.cache_dir, config.checkpoint.local_dir, config.backend.offload_dir])
    named += filter(None, [distill.teacher, distill.weights])
    # Not s3://bucket, nor the teacher timm:NAME; and containers cannot bind a path with a colon.
    here = [os.path.abspath(place) for place in named if ":" not in place]
    return [*dict.fromkeys([str(run_dir), *here])]


def _shards(folder: str) -> str | None:
    """Return where the shards lie that the index in a folder is of, if that is elsewhere."""
    try:
        base = json.loads((Path(folder) / "manifest.json").read_text())["base"]
    except (OSError, ValueError, KeyError, TypeError):  # the workers will say what is wrong
        return None
    return base if isinstance(base, str) else None
