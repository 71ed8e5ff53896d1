"""Where shards lie: a local folder, or whatever fsspec has a name for (`s3://`, `https://`, …).

Owns finding, opening and fetching them while they are indexed and verified.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from fsspec.implementations.local import LocalFileSystem

from data.base import DataError
from data.remote import Remote

SHARD_SUFFIXES = (".tar", ".beton")
FETCHED = ".fetch-"  # begins the name of a folder of shards that are only passing through


@dataclass(frozen=True)
class Location:
    """A folder of shards, and of folders of shards: a path or a URL."""

    url: str

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, or None if it is elsewhere."""
        path = self.url.removeprefix("file://")
        return None if "://" in path else Path(path)

    @cached_property
    def _remote(self) -> Remote:
        return Remote(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections cannot be sent to another process."""
        return Location, (self.url,)

    def shards(self) -> list[str]:
        """Return the shards' paths relative to the folder, sorted; hidden ones are left out.

        Raises DataError if there are none, or the index of one would take that of another's place.
        """
        with self._failing():
            found = self._remote.find() if self.folder is None else _find(self.folder)
        names = sorted(n for n in found if n.endswith(SHARD_SUFFIXES) and not _is_hidden(n))
        if not names:
            raise DataError(
                f"{self.url} holds no *.tar or *.beton shards; pack some, or name another folder"
            )
        stems: dict[PurePosixPath, str] = {}
        for name in names:
            other = stems.setdefault(PurePosixPath(name).with_suffix(""), name)
            if other != name:
                raise DataError(
                    f"{self.url}: {other} and {name} would have the same index; move one into a "
                    "folder of its own"
                )
        return names

    @contextmanager
    def opened(self, name: str, *, read_ahead: int) -> Iterator[IO[bytes]]:
        """Open a shard; from elsewhere `read_ahead` bytes are fetched at a time."""
        with self._failing():
            if self.folder is not None:
                with (self.folder / name).open("rb") as file:
                    yield file
            else:
                num_bytes, _ = self.version(name)
                far = _FarFile(self._remote, name, num_bytes)
                with io.BufferedReader(far, read_ahead) as file:
                    yield cast(IO[bytes], file)

    @contextmanager
    def local(self, name: str, scratch: Path) -> Iterator[Path]:
        """Give a shard as a file of this machine, fetched into `scratch` if it is none."""
        if self.folder is not None:
            yield self.folder / name
            return
        num_bytes, _ = self.version(name)
        with tempfile.TemporaryDirectory(prefix=FETCHED, dir=scratch) as folder:
            path = Path(folder) / PurePosixPath(name).name
            with path.open("wb") as file:
                for part in self._remote.stream(name, num_bytes):
                    file.write(part)
            yield path

    def version(self, name: str) -> tuple[int, str]:
        """Return a shard's size in bytes, and what its store says that changes when it does."""
        with self._failing():
            if self.folder is not None:
                info = LocalFileSystem().info(str(self.folder / name))
            else:
                info = self._remote.info(name)
        if info.get("size") is None:
            raise DataError(f"{self.url}/{name}: its server does not say how long it is; copy it")
        stable = {key: value for key, value in info.items() if key not in ("atime", "nlink")}
        digest = hashlib.sha256(repr(sorted(stable.items(), key=str)).encode()).hexdigest()
        return int(info["size"]), digest

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Word what goes wrong between here and there."""
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"{self.url} is not there ({error}); name another") from error
        except OSError as error:
            raise DataError(
                f"{self.url} cannot be read ({type(error).__name__}: {error}); check the address "
                "and what gives access, or copy it"
            ) from error


class _FarFile(io.RawIOBase):
    """A file elsewhere of `num_bytes`, read by requests for ranges."""

    def __init__(self, remote: Remote, name: str, num_bytes: int) -> None:
        self._remote = remote
        self._name = name
        self._num_bytes = num_bytes
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._num_bytes)
        if end <= self._place:
            return 0
        content = self._remote.read(self._name, start=self._place, end=end)
        buffer[: len(content)] = content
        self._place = end
        return len(content)


def _find(folder: Path) -> list[str]:
    """Return the names of all files below a folder; raises FileNotFoundError if it is none."""
    system = LocalFileSystem()
    found = system.find(str(folder))
    if not found:
        system.ls(str(folder))  # which says why
    root = str(folder.absolute()).rstrip("/") + "/"
    return [str(path).removeprefix(root) for path in found]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
