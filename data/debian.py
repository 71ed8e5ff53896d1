"""Files out of Debian packages, without root: `apt-get download`, then read as they are.

Owns the calls of `apt-get` and `dpkg-deb`. Nothing is installed, and nothing a package says is ever
a path here: what is asked for comes as bytes.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from data.base import DataError

_ELSEWHERE = "run this on a Debian or Ubuntu machine, and copy the finished folder"


def download(package: str, folder: Path, *, progress: Callable[[str], None] = print) -> Path:
    """Return the .deb file of `package` in `folder`, downloaded if it is not there.

    If it is not to be had by the machine's lists of packages, which may be missing or out of date,
    newer lists are read into `folder`. Raises DataError if that fails as well, or there is no
    `apt-get`.
    """
    for path in sorted(folder.glob(f"{package}_*.deb")):
        return path
    progress(f"downloading {package} with apt-get")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        reason = _apt_get(["download", package], Path(scratch))
        if reason:
            progress(f"that failed ({reason}); reading newer lists of packages")
            own = folder.absolute()  # apt-get runs elsewhere
            (own / "lists" / "partial").mkdir(parents=True, exist_ok=True)
            lists = ["-o", f"Dir::State::Lists={own}/lists", "-o", f"Dir::Cache={own}"]
            every = ["-o", "APT::Update::Error-Mode=any"]
            # It may fail at another repository than Debian's: the download has the last word.
            not_updated = _apt_get([*lists, *every, "update"], Path(scratch))
            reason = _apt_get([*lists, "download", package], Path(scratch))
            reason = reason and (not_updated or reason)
        if reason:
            raise DataError(
                f"the Debian package {package} could not be downloaded into {folder} ({reason}); "
                "see to the network, to room on the disk, and that apt's sources list Debian's "
                "main section"
            )
        [found] = Path(scratch).glob("*.deb")
        return found.rename(folder / found.name)


def read_files(package: Path, names: Collection[str]) -> dict[str, bytes]:
    """Return the contents of the files `names` of a .deb file; names have no slash before them.

    Raises DataError if the package is damaged, or lacks one of them.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    wanted, contents = set(names), dict[str, bytes]()
    try:
        with tempfile.TemporaryFile() as stderr:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
                contents, problem = _read_stream(process, wanted)
            stderr.seek(0)
            problem = _reason(stderr.read().decode(errors="replace")) or problem
    except FileNotFoundError as error:
        raise DataError(f"{package} needs dpkg-deb, which is not here; {_ELSEWHERE}") from error
    if process.returncode or problem:
        raise DataError(
            f"{package} is damaged ({problem or process.returncode}); remove it and run this again"
        )
    if missing := sorted(wanted - contents.keys()):
        raise DataError(
            f"{package} holds no {missing[0]} ({len(missing)} of {len(wanted)} files missing): it "
            "is of another Debian release than the one this is for, Debian 12"
        )
    return contents


def _read_stream(
    process: subprocess.Popen[bytes], wanted: Collection[str]
) -> tuple[dict[str, bytes], str]:
    """Return what is wanted of the tar that a process writes, and what was wrong with it or ''."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                file = tar.extractfile(member) if name in wanted and member.isfile() else None
                if file is not None:
                    contents[name] = file.read()
        assert process.stdout is not None, "it is a pipe"
        while process.stdout.read(2**20):  # to the end, where checksums are
            pass
    except (tarfile.TarError, EOFError) as error:
        return contents, str(error)
    return contents, ""


def _apt_get(arguments: Sequence[str], folder: Path) -> str:
    """Run `apt-get` in `folder`; returns why it failed, or '' if it did not."""
    command = ["apt-get", "--quiet", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError as error:
        raise DataError(f"this needs apt-get, which is not here; {_ELSEWHERE}") from error
    return _reason(done.stderr) or f"exit code {done.returncode}" if done.returncode else ""


def _reason(output: str) -> str:
    """Return the first line of an error in what a program wrote, or ''."""
    lines = [line.strip() for line in output.split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "dpkg-deb: error:"))]
    return next(iter(errors), "").removeprefix("E:").strip()[:300]
