"""Files below a URL: each request is retried, asked twice when slow, and checked before it counts.

Owns the requests to object stores and web servers, by way of fsspec. Invariant: what comes back is
exactly the bytes that were asked for, or a DataError that names the URL, the tries and the remedy.
Requests are coroutines in fsspec's own thread: hundreds may wait for their answers, and one that
is no longer needed is cancelled.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from data.base import DataError

_CONCURRENT = 64  # requests under way at a time
_CHUNK = 8 << 20  # bytes that one request of a whole file asks for
_CHUNKS_AHEAD = 4  # of those under way at a time
_GLANCE = 0.5  # seconds between looks at whether to stop
_TRIES = 10  # with the pauses between them some two minutes
_TRIES_OF_CONTENT = 3  # where an answer is whole, but wrong
_FIRST_PAUSE = 0.5  # seconds before the second try; doubled before each further one
_LONGEST_PAUSE = 30.0
_WARN_AFTER = 4  # tries
_STALLED = 30.0  # seconds without an answer
_REMEMBERED = 200  # durations of answers, of which the slowest twentieth counts as slow
_FAMILIAR = 20  # answers, before which nothing is known of what is slow
_EXTRA = 20  # one request in so many may be asked twice
_PACKAGES = {  # what setup.cfg calls the dependencies of a protocol
    **dict.fromkeys(("s3", "s3a", "http", "https"), "remote"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
}
_CONNECTIONS = {"config_kwargs": {"max_pool_connections": 2 * _CONCURRENT}}  # boto's limit is 10
_PROXIES = {"client_kwargs": {"trust_env": True}}  # those the environment names, as on clusters
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": _CONNECTIONS,
    "s3a": _CONNECTIONS,
    "http": _PROXIES,
    "https": _PROXIES,
}
_jitter = random.SystemRandom()  # moves nothing that is computed: pauses only


class Remote:
    """The files below `url`, whose protocol is one that fsspec knows: s3, gs, http, https, file.

    Any thread may use it; a forked process makes connections of its own. Raises DataError if the
    package for the protocol is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._protocol = _check_protocol(self.url)
        self._connecting = threading.Lock()
        self._connection: _Connection | None = None

    def start(
        self, name: str, *, start: int | None = None, end: int | None = None, sha256: str = ""
    ) -> Future[bytes]:
        """Ask for the bytes [start, end) of a file, or the whole of it; returns at once.

        With `sha256` the answer has that hash. The result raises DataError.
        """
        connection = self._connected()
        path = quote(name) if self._protocol in ("http", "https") else name
        request = _Request(self.url, name, f"{connection.root}/{path}", start, end, sha256)
        return asyncio.run_coroutine_threadsafe(connection.fetch(request), connection.loop)

    def read(
        self, name: str, *, start: int | None = None, end: int | None = None, sha256: str = ""
    ) -> bytes:
        """Return what `start` asks for."""
        return self.start(name, start=start, end=end, sha256=sha256).result()

    def stream(self, name: str, num_bytes: int, stop: threading.Event) -> Iterator[bytes]:
        """Yield the first `num_bytes` of a file in parts, a few of which are under way at a time.

        An interruption costs one part, not those that are there already. Ends early, within a
        second, once `stop` is set.
        """
        parts = (
            self.start(name, start=start, end=min(start + _CHUNK, num_bytes))
            for start in range(0, num_bytes, _CHUNK)
        )
        pending = deque(islice(parts, _CHUNKS_AHEAD))
        try:
            while pending and not stop.is_set():
                try:
                    content = pending[0].result(timeout=_GLANCE)
                except TimeoutError:
                    continue
                pending.popleft()
                pending.extend(islice(parts, 1))
                yield content
        finally:
            for part in pending:
                part.cancel()

    def _connected(self) -> _Connection:
        with self._connecting:
            if self._connection is None or self._connection.process != os.getpid():
                self._connection = _Connection(self.url, self._protocol)
            return self._connection


class _Request:
    """What is asked for, and whether an answer is that."""

    def __init__(
        self, url: str, name: str, path: str, start: int | None, end: int | None, sha256: str
    ) -> None:
        self.folder = url
        self.url = f"{url}/{name}"
        self.path = path
        self.limits = {} if start is None else {"start": start, "end": end}
        self._num_bytes = None if start is None or end is None else end - start
        self._sha256 = sha256

    def check(self, content: bytes) -> bytes:
        """Return `content` if it is whole and right; raises OSError or _WrongContent otherwise."""
        expected = self._num_bytes
        if expected is not None and len(content) < expected:
            raise OSError(f"{len(content)} of {expected} bytes came")
        if expected is not None and len(content) > expected:
            raise _WrongContent(
                f"{len(content)} bytes came where {expected} were asked for: the server knows no "
                "ranges"
            )
        if self._sha256:
            found = hashlib.sha256(content).hexdigest()
            if found != self._sha256:
                raise _WrongContent(f"its SHA-256 is {found} instead of {self._sha256}")
        return content


class _WrongContent(Exception):
    """An answer that is whole but not what it should be: further tries hardly mend that."""


class _Connection:
    """The file system of one process, and how fast it has answered. Lives in fsspec's thread."""

    def __init__(self, url: str, protocol: str) -> None:
        options = _OPTIONS.get(protocol, {})
        # What fsspec has cached was made for earlier settings of the environment.
        files, self.root = url_to_fs(url, skip_instance_cache=True, **options)
        if not files.async_impl:
            files = AsyncFileSystemWrapper(files, asynchronous=False)
        self.process = os.getpid()
        self.loop: asyncio.AbstractEventLoop = files.loop
        self._files = files
        self._free = asyncio.Semaphore(_CONCURRENT)
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._answers = self._extra = 0

    async def fetch(self, request: _Request) -> bytes:
        """Return the bytes that `request` asks for, after as many tries as it takes."""
        async with self._free:
            for tries in range(1, _TRIES + 1):
                try:
                    return request.check(await self._answer(request))
                except FileNotFoundError as error:
                    raise DataError(
                        f"{request.url} is missing: restore it, or run `foveate data index "
                        f"{request.folder}`"
                    ) from error
                except Exception as error:  # each backend has exceptions of its own
                    if _is_refusal(error):
                        raise DataError(
                            f"{request.url} may not be read ({error!r}): give this process "
                            "credentials that may"
                        ) from error
                    if tries == _tries_of(error):
                        raise _failure(request, tries, error) from error
                    if tries == _WARN_AFTER:
                        warnings.warn(f"{request.url}: {error!r}; trying on", stacklevel=2)
                await asyncio.sleep(_pause(tries))
        raise AssertionError("the last try returns or raises")

    async def _answer(self, request: _Request) -> bytes:
        """Return the first of two answers, where the first request takes longer than most did.

        Those are other ranges: whole files, which are read once, may be of any size.
        """
        begun = time.monotonic()
        tasks = {self._ask(request)}
        try:
            patience = self._patience() if request.limits else _STALLED
            done, _ = await asyncio.wait(tasks, timeout=patience)
            if not done:
                self._extra += 1
                tasks.add(self._ask(request))
                done, _ = await asyncio.wait(
                    tasks, timeout=_STALLED, return_when=asyncio.FIRST_COMPLETED
                )
            if not done:
                raise TimeoutError(f"no answer in {_STALLED:.0f} seconds")
            content = min(done, key=lambda task: task.exception() is not None).result()
        finally:
            for task in tasks:
                task.cancel()
        if request.limits:
            self._answers += 1
            self._seconds.append(time.monotonic() - begun)
        return content

    def _ask(self, request: _Request) -> asyncio.Task[bytes]:
        task: asyncio.Task[bytes] = asyncio.ensure_future(
            self._files._cat_file(request.path, **request.limits)
        )
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all are seen
        return task

    def _patience(self) -> float:
        """Return after how many seconds to ask again: more than 19 of 20 answers took.

        No more than that share of the requests is asked twice, lest a server that is slow for all
        of them gets twice as much to do.
        """
        if len(self._seconds) < _FAMILIAR or self._extra * _EXTRA > self._answers:
            return _STALLED
        return sorted(self._seconds)[len(self._seconds) * 19 // 20]


def _check_protocol(url: str) -> str:
    """Return the protocol of `url`; raises DataError if nothing here speaks it."""
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _PACKAGES.get(protocol)
        remedy = (
            f"run `pip install --editable '.[{extra}]'` in Foveate's folder"
            if extra
            else "install what it names"
        )
        raise DataError(f"{url} cannot be opened ({error}): {remedy}") from error
    except ValueError as error:
        raise DataError(
            f"{url}: {protocol!r} is not a protocol that fsspec knows, such as s3, gs, http, https "
            "or file"
        ) from error
    return protocol


def _is_refusal(error: Exception) -> bool:
    """Whether the server, or boto for want of credentials, said no: it will not change its mind."""
    status = getattr(error, "status", None)  # of aiohttp's exceptions
    named = type(error).__name__ == "NoCredentialsError"
    return isinstance(error, PermissionError) or status in (401, 403) or named


def _tries_of(error: Exception) -> int:
    return _TRIES_OF_CONTENT if isinstance(error, _WrongContent) else _TRIES


def _pause(tries: int) -> float:
    """Return the seconds to wait after so many tries: others that failed now wait otherwise."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (tries - 1)) * _jitter.uniform(0.5, 1.0)


def _failure(request: _Request, tries: int, error: Exception) -> DataError:
    if isinstance(error, _WrongContent):
        return DataError(
            f"{request.url} is not what the manifest says after {tries} tries: {error}; restore "
            f"it, or run `foveate data index {request.folder}`"
        )
    return DataError(
        f"{request.url} cannot be read after {tries} tries ({error!r}): check that this machine "
        "reaches it, and start again"
    )
