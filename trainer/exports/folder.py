"""Exported folders: written whole or not at all, and proved in a process without Foveate.

Invariant: no code of a folder runs in this process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import manifest
from ..config import UserError
from .vendored import HOME, joined

SUMS = "SHA256SUMS"  # as sha256sum writes and checks them
CHECK = "verify.py"
_CARD = "README.md"  # whose text is people's to change


def write_folder(
    out: Path, write: Callable[[Path], None], *, sample: dict[str, Tensor], check: str, library: str
) -> None:
    """Let `write` fill a folder, add its `sample` and the module `check`, and publish it as `out`.

    `library` is the one that must prove it, where `check` knows several.

    It appears under its name only when it is complete and reproduces the sample.

    Raises:
        UserError: if `out` is in the way or cannot be written, or the folder does not verify.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: remove it, or give another --out")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write(part)
        save_file(sample, part / "sample.safetensors")
        (part / CHECK).write_text(f"{joined([check])}\n")
        _seal(part)
        wrong = run_check(part, library)
        if wrong is not None:
            raise UserError(f"{out} is not written: the export does not verify: {wrong}")
        part.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Write the hash of every file, so that damage shows before anything is run."""
    for path in folder.iterdir():  # safetensors are written for their owner alone
        path.chmod(folder.stat().st_mode & 0o666)
    files = sorted(path for path in folder.iterdir() if path.name != _CARD)
    lines = [f"{manifest.describe(path).sha256}  {path.name}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def verify(folder: Path) -> None:
    """Make sure that an exported folder is whole and computes what it did when it was written.

    Raises:
        UserError: if it is damaged, of another kind, or computes something else.
    """
    _check_sums(folder)
    wrong = run_check(folder)
    if wrong is not None:
        raise UserError(f"{folder} does not verify: {wrong}")


def _check_sums(folder: Path) -> None:
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder} is not a folder that foveate export wrote: {SUMS}: {reason}"
        ) from None
    found = [re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) < len(lines) or CHECK not in sums:
        raise UserError(f"{folder / SUMS} is damaged: export again")
    for name, sha256 in sums.items():
        try:
            if manifest.describe(folder / name).sha256 != sha256:
                raise UserError(f"{folder / name} does not match its hash in {SUMS}: export again")
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}") from None


def run_check(folder: Path, *libraries: str, python: str = sys.executable) -> str | None:
    """Run a folder's verify.py in a fresh process of `python`; return what is wrong, or None.

    `libraries` must be there; others prove it where they are.

    The process finds what this one finds, a torch by PYTHONPATH for one, but for Foveate: this
    code's folder is taken out, and verify.py blocks its packages wherever else they are.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(path for path in paths if path and Path(path).resolve() != HOME)
    done = subprocess.run(
        [python, "-P", "-B", str(folder / CHECK), *libraries],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return said[-1] if said else f"exit code {done.returncode}"
    print(done.stdout.strip())
    return None
