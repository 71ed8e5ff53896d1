"""NodeDisk: a fast disk of each node as a checkpoint's first stop on its way to the run folder.

Every rank leaves its file and the manifest of the whole there. The invariant: what is taken on from
there is complete, file by file what the manifest says.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from . import manifest
from .manifest import Manifest


class NodeDisk:
    """The place below `local_dir` of the run whose checkpoints are in `root`."""

    def __init__(self, local_dir: Path, root: Path) -> None:
        run = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
        self.folder = local_dir / run

    def place(self, step: int, generation: int) -> Path:
        """Return the folder for a checkpoint's files."""
        return manifest.staging_folder(self.folder, step, generation)

    def keep(self, whole: Manifest, path: Path) -> None:
        """Note which checkpoint the file at `path` is part of, now that all of it is written."""
        manifest.write_atomically(path.with_suffix(".json"), whole.to_json())

    def left(self) -> dict[str, list[Path]]:
        """Return the files that are good here, by their checkpoint's manifest as JSON."""
        found: dict[str, list[Path]] = {}
        for note in sorted(self.folder.glob("writing_*/rank_*.json")):
            path = note.with_suffix(".safetensors")
            try:
                text = note.read_text()
                good = manifest.describe(path) in manifest.parse(text).files
            except (OSError, ValueError):
                continue  # a crash has cut it short, for one
            if good:
                found.setdefault(text, []).append(path)
        return found

    def clear(self) -> None:
        """Remove everything of the run: it is in the run folder, or of no use."""
        shutil.rmtree(self.folder, ignore_errors=True)
