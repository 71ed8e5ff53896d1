"""One process's connection to a store: tries that go on, second requests, and patience.

Owns when a request is given up, made again or made twice. Patience is for silence, never for
length: bytes that keep coming may take as long as they take. Invariant: what an answer is accepted
as is exactly the bytes that were asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from fsspec import get_filesystem_class
from fsspec.core import url_to_fs
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from data.base import DataError

Answer = TypeVar("Answer")

_CONCURRENT = 64  # requests under way at a time
_TRIES = 10  # with the pauses between them some two minutes
_TRIES_OF_CONTENT = 3  # where an answer is whole, but wrong
_FIRST_PAUSE = 0.5  # seconds before the second try; doubled before each further one
_LONGEST_PAUSE = 30.0
_WARN_AFTER = 4  # tries
_SILENCE = 30.0  # seconds without a byte
_REMEMBERED = 200  # durations of answers, of which the slowest twentieth counts as slow
_FAMILIAR = 20  # answers, before which nothing is known of what is slow
_EXTRA = 20  # one request in so many may be asked twice
_BUSY = (408, 425, 429)  # statuses that ask for patience, where others of the 400s mean no
_PACKAGES = {  # what setup.cfg calls the dependencies of a protocol
    **dict.fromkeys(("s3", "s3a", "http", "https"), "remote"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
}
_jitter = random.SystemRandom()  # moves nothing that is computed: pauses only


class Request:
    """The bytes [start, end) of a file, or the whole of it, and whether an answer is that."""

    def __init__(self, path: str, start: int | None, end: int | None, sha256: str) -> None:
        self.path = path
        self.limits = {} if start is None else {"start": start, "end": end}
        self._num_bytes = None if start is None or end is None else end - start
        self._sha256 = sha256

    def check(self, content: bytes) -> bytes:
        """Return `content` if it is whole and right; raises OSError or WrongContent otherwise."""
        expected = self._num_bytes
        if expected is not None and len(content) < expected:
            raise OSError(f"{len(content)} of {expected} bytes came")
        if expected is not None and len(content) > expected:
            raise WrongContent(
                f"{len(content)} bytes came where {expected} were asked for: the server knows no "
                "ranges"
            )
        if self._sha256:
            found = hashlib.sha256(content).hexdigest()
            if found != self._sha256:
                raise WrongContent(f"its SHA-256 is {found} instead of {self._sha256}")
        return content


class WrongContent(Exception):
    """An answer that is whole but not what it should be: further tries hardly mend that."""


class Connection:
    """The file system of one process below a URL, and how fast it has answered.

    It lives in fsspec's thread; `begin` and `cancel` are for any other. `root` is the URL's path.
    """

    def __init__(self, url: str, protocol: str) -> None:
        # What fsspec has cached was made for earlier settings of the environment.
        files, root = url_to_fs(url, skip_instance_cache=True, **_options(protocol))
        if not files.async_impl:
            files = AsyncFileSystemWrapper(files, asynchronous=False)
        self.root: str = root.rstrip("/")
        self.process = os.getpid()
        self.files = files
        self._under_way: set[Future[Any]] = set()
        self._free = asyncio.Semaphore(_CONCURRENT)
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._answers = self._extra = 0

    def begin(self, work: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        """Let fsspec's thread do `work`; returns at once."""
        future = asyncio.run_coroutine_threadsafe(work, self.files.loop)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def cancel(self) -> None:
        """Cancel all that is under way."""
        for future in list(self._under_way):
            future.cancel()

    async def fetch(self, request: Request) -> bytes:
        """Return the bytes that `request` asks for; raises what goes wrong.

        Where the first request for a range takes longer than most did, a second one is made, and
        the first answer counts. Whole files, which are read once, may be of any size.
        """
        begun = time.monotonic()
        asked = {self._ask(request)}
        try:
            done, _ = await asyncio.wait(
                asked, timeout=self._patience() if request.limits else None
            )
            if not done:
                self._extra += 1
                asked.add(self._ask(request))
            while not any(task.exception() is None for task in done) and len(done) < len(asked):
                more, _ = await asyncio.wait(asked - done, return_when=asyncio.FIRST_COMPLETED)
                done |= more
            content = min(done, key=lambda task: task.exception() is not None).result()
        finally:
            for task in asked:
                task.cancel()
        if request.limits:
            self._answers += 1
            self._seconds.append(time.monotonic() - begun)
        return request.check(content)

    async def persist(self, url: str, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return what `ask` answers, after as many tries as it takes.

        Raises FileNotFoundError if `url` is not there, and DataError naming it and the tries if it
        may not, or cannot, be read.
        """
        wrong = 0
        for tries in range(1, _TRIES + 1):
            try:
                async with self._free:
                    return await ask()
            except Exception as error:  # each backend has exceptions of its own
                if _is_missing(error):
                    raise FileNotFoundError(url) from error
                if _is_refusal(error):
                    raise DataError(
                        f"{url} may not be read ({describe(error)}): give this process credentials "
                        "that may"
                    ) from error
                wrong += isinstance(error, WrongContent)
                if tries == _TRIES or wrong == _TRIES_OF_CONTENT or _is_meaningless(error):
                    raise _failure(url, tries, error) from error
                if tries == _WARN_AFTER:
                    warnings.warn(f"{url}: {describe(error)}; trying on", stacklevel=2)
            await asyncio.sleep(_pause(tries))
        raise AssertionError("the last try returns or raises")

    def _ask(self, request: Request) -> asyncio.Task[bytes]:
        task: asyncio.Task[bytes] = asyncio.ensure_future(
            self.files._cat_file(request.path, **request.limits)
        )
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all are seen
        return task

    def _patience(self) -> float | None:
        """Return after how many seconds to ask again: more than 19 of 20 answers took.

        No more than that share of the requests is asked twice, lest a server that is slow for all
        of them gets twice as much to do.
        """
        if len(self._seconds) < _FAMILIAR or self._extra * _EXTRA > self._answers:
            return None
        return sorted(self._seconds)[len(self._seconds) * 19 // 20]


def check_protocol(url: str) -> str:
    """Return the protocol of `url`; raises DataError if nothing here speaks it."""
    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
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


def describe(error: Exception) -> str:
    """Return an error of a store on one line: what some say alone says nothing."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _options(protocol: str) -> dict[str, Any]:
    """Return what fsspec is told: to bear no silence, and to use the environment's proxies."""
    if protocol in ("s3", "s3a"):
        silence = {"connect_timeout": _SILENCE, "read_timeout": _SILENCE}
        return {"config_kwargs": {"max_pool_connections": 2 * _CONCURRENT, **silence}}
    if protocol in ("http", "https", "gs", "gcs"):
        from aiohttp import ClientTimeout  # which only these need

        # The default is five minutes for an answer, however long.
        timeout = ClientTimeout(total=None, connect=_SILENCE, sock_read=_SILENCE)
        if protocol.startswith("http"):
            return {"client_kwargs": {"trust_env": True, "timeout": timeout}}
        return {"session_kwargs": {"trust_env": True}, "requests_timeout": timeout}
    return {}


def _is_missing(error: Exception) -> bool:
    """Whether there is no such file: fsspec says so too where a server gave no answer."""
    gave_none = type(error.__cause__).__module__.startswith("aiohttp")
    return isinstance(error, FileNotFoundError) and not gave_none


def _is_refusal(error: Exception) -> bool:
    """Whether the server, or boto for want of credentials, said no: it will not change its mind."""
    status = getattr(error, "status", None)  # of aiohttp's exceptions
    named = type(error).__name__ == "NoCredentialsError"
    return isinstance(error, PermissionError) or status in (401, 403) or named


def _is_meaningless(error: Exception) -> bool:
    """Whether there is no such address, or the server makes nothing of what it is asked."""
    status = getattr(error, "status", 0)  # of aiohttp's exceptions
    named = type(error).__name__ == "ParamValidationError"  # of boto
    refused = 400 <= status < 500 and status not in _BUSY
    return isinstance(error, ValueError) or named or refused


def _pause(tries: int) -> float:
    """Return the seconds to wait after so many tries: others that failed now wait otherwise."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (tries - 1)) * _jitter.uniform(0.5, 1.0)


def _failure(url: str, tries: int, error: Exception) -> DataError:
    if isinstance(error, WrongContent):
        folder = url.rpartition("/")[0]
        return DataError(
            f"{url} is not what the manifest says after {tries} tries: {error}; restore it, or "
            f"run `foveate data index {folder} --out FOLDER` and read that folder"
        )
    often = f" after {tries} tries" if tries > 1 else ""
    return DataError(
        f"{url} cannot be read{often} ({describe(error)}): check the address, and that this "
        "machine reaches it, and start again"
    )
