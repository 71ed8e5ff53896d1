"""The Python that Slurm's tasks run: this process's own, or that of a container image."""

from __future__ import annotations

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
    """Return the folders that the workers of a run read or write."""
    data, local_dir = config.data, config.checkpoint.local_dir
    named = [data.train, data.val] if data.source != "synthetic" else []
    named = [folder for folder in named if "://" not in folder]
    named += filter(None, [data.cache_dir, local_dir])
    return [str(run_dir), *map(os.path.abspath, named)]
