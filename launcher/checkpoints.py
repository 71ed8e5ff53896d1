"""Checkpoints from outside: `foveate ckpt ls | verify | diff | rm`.

They are looked at where they lie, while the run goes on or long after, without torch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer import manifest
from trainer.config import UserError
from trainer.shardfile import Box, Piece, ShardFile

from .table import duration, table

USAGE = """\
usage: foveate ckpt ls RUN                    list them: step, size, age, state, who wrote them
       foveate ckpt verify RUN                hash every file again
       foveate ckpt diff A B                  name the tensors that differ; A and B are runs (the
                                              newest good one counts) or folders of checkpoints
       foveate ckpt rm RUN STEP ... [--force] remove; the last good one only with --force
"""


def ls(run_dir: Path) -> int:
    """Print a table of a run's checkpoints, oldest first; sizes are compared, hashes are not."""
    rows = [("step", "size", "age", "state", "written by")]
    for folder in _of_run(run_dir):
        with contextlib.suppress(FileNotFoundError):  # the run has removed it meanwhile
            rows.append(_row(folder))
    print(table(rows, left=(3, 4)))
    return 0


def _row(folder: Path) -> tuple[str, str, str, str, str]:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    age = duration(time.time() - folder.stat().st_mtime)
    cells = (str(manifest.step_of(folder)), _bytes(sum(sizes.values())), age)
    try:
        found = manifest.read(folder)
    except ValueError:
        return (*cells, "damaged", "")
    whole = all(sizes.get(file.name) == file.num_bytes for file in found.files)
    best = found.record["state"]["best_step"] == found.step
    state = ("good" if whole else "damaged") + (", best" if best else "")
    # Each process wrote one file; versions before this one did not say which backend it had.
    backend = found.record.get("backend", "unknown backend")
    return (*cells, state, f"{backend} on {len(found.files)}, start {found.generation}")


def verify(run_dir: Path) -> int:
    """Hash every file of a run's checkpoints and print what is wrong.

    Raises:
        UserError: if one of them is damaged.
    """
    damaged = []
    for folder in _of_run(run_dir):
        wrong = manifest.damage(folder)
        print(f"step {manifest.step_of(folder)}: {'; '.join(wrong) or 'good'}", flush=True)
        if wrong:
            damaged.append(str(manifest.step_of(folder)))
    if damaged:
        raise UserError(
            f"{run_dir} has damaged checkpoints: a start of the run skips them, and foveate ckpt "
            f"rm {run_dir} {' '.join(damaged)} removes them"
        )
    return 0


def diff(first: Path, second: Path) -> int:
    """Print every tensor that differs with the largest difference; return 1 if there is one.

    Raises:
        UserError: if one of the two is no whole checkpoint.
    """
    left, right = (
        _Tensors(manifest.whole_checkpoint(first)),
        _Tensors(manifest.whole_checkpoint(second)),
    )
    count = 0
    for name in sorted(left.pieces.keys() | right.pieces.keys()):
        found = _difference(name, left, right)
        if found is not None:
            count += 1
            print(f"{name}  {found}")
    total = len(left.pieces.keys() | right.pieces.keys())
    print(f"{count} of {total} tensors differ: {left.folder} and {right.folder}")
    return 1 if count else 0


def remove(run_dir: Path, steps: Sequence[int], *, force: bool) -> int:
    """Delete checkpoints of a run.

    Raises:
        UserError: if a step has none, or the last good one would go without `force`.
    """
    folders = _of_run(run_dir)
    asked = [manifest.step_folder(run_dir / "checkpoints", step) for step in steps]
    for folder in asked:
        if folder not in folders:
            known = ", ".join(str(manifest.step_of(path)) for path in folders)
            raise UserError(
                f"{run_dir} has no checkpoint of step {manifest.step_of(folder)} (it has {known})"
            )
    others = (folder for folder in reversed(folders) if folder not in asked)
    if not force and all(map(manifest.damage, others)):
        raise UserError(
            f"no good checkpoint would be left in {run_dir}: keep one, or add --force to lose the "
            "run's progress"
        )
    for folder in dict.fromkeys(asked):
        manifest.remove(folder)
        print(f"removed {folder}")
    return 0


class _Tensors:
    """The tensors of a checkpoint, put together from its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[str, list[tuple[ShardFile, Piece]]] = {}
        for record in manifest.read(folder).files:
            file = ShardFile(folder / record.name)
            for name, piece in file.pieces.items():
                self.pieces.setdefault(name, []).append((file, piece))

    def form(self, name: str) -> str:
        """Type and shape of a tensor, `F32 [96, 3]`; `nothing` where there is none."""
        if name not in self.pieces:
            return "nothing"
        piece = self.pieces[name][0][1]
        return f"{piece.dtype} {list(piece.shape)}"

    def read(self, name: str) -> Any:
        """The whole tensor as a NumPy array."""
        import numpy as np

        piece = self.pieces[name][0][1]
        kind = {"F": "f", "I": "i", "U": "u", "B": "u"}[piece.dtype[0]]
        size = 1 if piece.dtype == "BOOL" else int(piece.dtype.lstrip("BFIU")) // 8
        whole = np.empty(piece.shape, dtype=f"<{kind}{size}")
        around = Box.whole(piece.shape)
        for file, part in self.pieces[name]:
            stored = np.frombuffer(file.data(name), dtype=whole.dtype)
            whole[part.box.within(around)] = stored.reshape(part.box.sizes)
        if piece.dtype == "BF16":  # the upper half of an fp32 number
            return (whole.astype("<u4") << 16).view("<f4")
        return whole


def _difference(name: str, left: _Tensors, right: _Tensors) -> str | None:
    """Say how a tensor differs, or return None."""
    import numpy as np

    if left.form(name) != right.form(name):
        return f"{left.form(name)} against {right.form(name)}"
    one, other = left.read(name), right.read(name)
    if one.tobytes() == other.tobytes():
        return None
    differ = int((one != other).sum())
    largest = float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())
    return f"max |difference| {largest:.3g} in {differ} of {math.prod(one.shape)} numbers"


def _of_run(run_dir: Path) -> list[Path]:
    """The checkpoints of a run.

    Raises:
        UserError: if there are none.
    """
    folders = manifest.checkpoints(run_dir / "checkpoints")
    if not folders:
        raise UserError(f"{run_dir} has no checkpoints: give a run folder, such as runs/demo")
    return folders


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
