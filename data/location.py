"""Where shards lie: a local folder, or whatever fsspec has a name for (`s3://`, `https://`, …).

Owns finding, opening and fetching them while they are indexed and verified.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

import fsspec

from data.base import DataError

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

    def shards(self) -> list[str]:
        """Return the shards' paths relative to the folder, sorted; hidden ones are left out.

        Raises DataError if there are none, or the index of one would take that of another's place.
        """
        with self._failing():
            system, root = fsspec.core.url_to_fs(self.url)
            found = system.find(root)
            if not found:
                system.ls(root)  # which says why, where finding nothing is all that `find` does
        root = root.rstrip("/") + "/"
        names = sorted(str(path).removeprefix(root) for path in found)
        names = [name for name in names if name.endswith(SHARD_SUFFIXES) and not _is_hidden(name)]
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
        """Open a shard; from elsewhere at least `read_ahead` bytes are fetched at a time."""
        with self._failing():
            system, root = fsspec.core.url_to_fs(self.url)
            # The cache is one buffer that moves along with the reading.
            with system.open(
                f"{root.rstrip('/')}/{name}", block_size=read_ahead, cache_type="readahead"
            ) as file:
                yield cast(IO[bytes], file)

    @contextmanager
    def local(self, name: str, scratch: Path) -> Iterator[Path]:
        """Give a shard as a file of this machine, fetched into `scratch` if it is none."""
        if self.folder is not None:
            yield self.folder / name
            return
        with tempfile.TemporaryDirectory(prefix=FETCHED, dir=scratch) as folder:
            path = Path(folder) / PurePosixPath(name).name
            with self._failing():
                system, root = fsspec.core.url_to_fs(self.url)
                system.get_file(f"{root.rstrip('/')}/{name}", str(path))
            yield path

    def version(self, name: str) -> tuple[int, str]:
        """Return a shard's size in bytes, and what its store says that changes when it does."""
        with self._failing():
            system, root = fsspec.core.url_to_fs(self.url)
            info = system.info(f"{root.rstrip('/')}/{name}")
        if info.get("size") is None:
            raise DataError(f"{self.url}/{name}: its server does not say how long it is; copy it")
        stable = {key: value for key, value in info.items() if key not in ("atime", "nlink")}
        digest = hashlib.sha256(repr(sorted(stable.items(), key=str)).encode()).hexdigest()
        return int(info["size"]), digest

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Word what goes wrong between here and there."""
        # Each store has errors of its own, of no common kind.
        kinds = (OSError, ImportError, ValueError) if self.folder is not None else (Exception,)
        try:
            yield
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{self.url} is not there ({error}); name another") from error
        except kinds as error:
            raise DataError(
                f"{self.url} cannot be read ({type(error).__name__}: {error}); check the address "
                "and what gives access, or copy it"
            ) from error


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
