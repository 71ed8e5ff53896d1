"""Files below a URL: whole, in part, or as a list, by way of fsspec.

Owns the requests to object stores and web servers. Invariant: what comes back is exactly what was
asked for, or a DataError that names the URL, the tries and the remedy, or Stopped. Requests are
coroutines in fsspec's own thread: hundreds may wait for their answers, and all that are under way
can be cancelled.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Awaitable, Iterator
from concurrent.futures import CancelledError, Future
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from data.base import DataError, Stopped
from data.connection import Connection, Request, check_protocol, describe

Answer = TypeVar("Answer")

_CHUNK = 8 << 20  # bytes that one request of a whole file asks for
_CHUNKS_AHEAD = 4  # of those under way at a time


class Remote:
    """The files below `url`, whose protocol is one that fsspec knows: s3, gs, http, https, file.

    Any thread may use it; a forked process makes connections of its own. Raises DataError if the
    package for the protocol is not installed, or finds no way to connect.
    """

    def __init__(self, url: str) -> None:
        if not url.partition("://")[2].strip("/"):
            raise DataError(f"{url} names no bucket, server or folder: add it")
        self.url = url.rstrip("/")
        self._protocol = check_protocol(self.url)
        self._connecting = threading.Lock()
        self._connection: Connection | None = None

    def start(
        self, name: str, *, start: int | None = None, end: int | None = None, sha256: str = ""
    ) -> Future[bytes]:
        """Ask for the bytes [start, end) of a file, or the whole of it; returns at once.

        With `sha256` the answer has that hash. `finish` gives the answer.
        """
        connection = self._connected()
        request = Request(self._path(connection, name), start, end, sha256)
        return connection.begin(self._fetch(connection, name, request))

    def read(
        self, name: str, *, start: int | None = None, end: int | None = None, sha256: str = ""
    ) -> bytes:
        """Return what `start` asks for, as `finish` does."""
        return finish(self.start(name, start=start, end=end, sha256=sha256))

    def stream(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """Yield the first `num_bytes` of a file in parts, a few of which are under way at a time.

        An interruption costs one part, not those that are there already. Raises as `finish` does.
        """
        parts = (
            self.start(name, start=start, end=min(start + _CHUNK, num_bytes))
            for start in range(0, num_bytes, _CHUNK)
        )
        pending = deque(islice(parts, _CHUNKS_AHEAD))
        try:
            while pending:
                content = finish(pending.popleft())
                pending.extend(islice(parts, 1))
                yield content
        finally:
            for part in pending:
                part.cancel()

    def find(self) -> list[str]:
        """Return the names of all files below the URL, those in folders too.

        Raises FileNotFoundError if there is no such place, else as `finish` does.
        """
        connection = self._connected()
        find = self._find_links if self._is_web() else self._find_files
        paths = finish(connection.begin(find(connection, connection.root)))
        names = [path.removeprefix(connection.root).lstrip("/") for path in paths]
        return [unquote(name) for name in names] if self._is_web() else names

    def info(self, name: str) -> dict[str, Any]:
        """Return what the store says of a file, its `size` in bytes for one.

        Raises FileNotFoundError if there is none, else as `finish` does.
        """
        connection = self._connected()

        def ask() -> Awaitable[dict[str, Any]]:
            answer: Awaitable[dict[str, Any]] = connection.files._info(self._path(connection, name))
            return answer

        return finish(connection.begin(connection.persist(f"{self.url}/{name}", ask)))

    def pause(self, seconds: float) -> None:
        """Wait; raises Stopped if this is closed meanwhile."""
        finish(self._connected().begin(asyncio.sleep(seconds)))

    def close(self) -> None:
        """Cancel what is under way: who waits for it gets Stopped. New requests may be made."""
        with self._connecting:
            connection = self._connection
        if connection is not None:
            connection.cancel()

    async def _find_files(self, connection: Connection, root: str) -> list[str]:
        async def find() -> list[str]:
            found: list[str] = await connection.files._find(root)
            if not found:
                await connection.files._ls(root)  # which says why: finding nothing is no error
            return found

        return await connection.persist(self.url, find)

    async def _find_links(self, connection: Connection, folder: str) -> list[str]:
        """Follow a web server's lists; fsspec leaves out those that it does not get."""
        links = await connection.persist(folder, lambda: connection.files._ls(f"{folder}/"))
        found = []
        for link in (link["name"] for link in links):
            if not link.endswith("/"):
                found.append(link)
            elif not link.endswith("/./"):
                found += await self._find_links(connection, link.rstrip("/"))
        return found

    async def _fetch(self, connection: Connection, name: str, request: Request) -> bytes:
        url = f"{self.url}/{name}"
        try:
            return await connection.persist(url, lambda: connection.fetch(request))
        except FileNotFoundError as error:
            raise DataError(
                f"{url} is missing: check the address, restore the file, or run `foveate data "
                f"index {self.url} --out FOLDER` and read that folder"
            ) from error

    def _path(self, connection: Connection, name: str) -> str:
        return f"{connection.root}/{quote(name) if self._is_web() else name}"

    def _is_web(self) -> bool:
        return self._protocol in ("http", "https")

    def _connected(self) -> Connection:
        with self._connecting:
            if self._connection is None or self._connection.process != os.getpid():
                try:
                    self._connection = Connection(self.url, self._protocol)
                except Exception as error:  # each backend has exceptions of its own
                    raise DataError(
                        f"{self.url} cannot be opened ({describe(error)}): check the address, and "
                        "what gives this process access"
                    ) from error
            return self._connection


def finish(request: Future[Answer]) -> Answer:
    """Wait for the answer to a request.

    Raises DataError naming what cannot be had, and Stopped once it was cancelled.
    """
    try:
        return request.result()
    except CancelledError as error:
        raise Stopped("the source was closed") from error
    finally:
        del request  # which has its error, whose frames would keep what they hold, open files too
