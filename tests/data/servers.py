"""Servers on the loopback interface: a web server that can be told to fail, and one for S3."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import quote, unquote
from urllib.request import Request, urlopen

import fsspec
from moto.server import ThreadedMotoServer

_NO_PROXY = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class FileServer:
    """Serves the files of a folder over HTTP, ranges and lists included; counts the requests.

    `faults[NAME]` are what is to happen to the next requests for a file, one after the other:
    "drop" the connection in mid-body, send a "short" body, or one with a "corrupt" byte, answer
    "503" or "403", know no ranges ("whole"), "stall" until `release` is set, "trickle" the body in
    over two seconds, or None: nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, deque[str | None]] = defaultdict(deque)
        self.requests: list[tuple[str, str | None]] = []  # names and ranges
        self.stalled = threading.Semaphore(0)  # released by every request that begins to stall
        self.release = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FileServer:
        self._environment = mock.patch.dict(os.environ, _NO_PROXY)
        self._environment.start()
        threading.Thread(target=self._server.serve_forever, args=(0.05,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._environment.stop()
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, name: str) -> int:
        return sum(requested == name for requested, _ in self.requests)

    def _take(self, name: str, span: str | None) -> str | None:
        with self._lock:
            self.requests.append((name, span))
            return self.faults[name].popleft() if self.faults[name] else None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else each answer takes the 40 ms of a late ACK

            def do_GET(self) -> None:
                name = unquote(self.path.lstrip("/"))
                fault = server._take(name, self.headers["Range"])
                if fault == "stall":
                    server.stalled.release()
                    server.release.wait()
                    self.close_connection = True
                elif fault in ("503", "403"):
                    self.send_error(int(fault))
                elif (server.folder / name).is_dir():
                    self._list(server.folder / name)
                elif not (server.folder / name).is_file():
                    self.send_error(404)
                else:
                    self._answer((server.folder / name).read_bytes(), fault)

            def _list(self, folder: Path) -> None:
                names = [path.name + "/" * path.is_dir() for path in folder.iterdir()]
                page = "".join(f'<a href="{quote(name)}">{name}</a>' for name in names).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def _answer(self, content: bytes, fault: str | None) -> None:
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
                if span is not None and fault != "whole":
                    if int(span[1]) >= len(content):
                        self.send_error(416)
                        return
                    content = content[int(span[1]) : int(span[2]) + 1]
                half = len(content) // 2
                if fault == "short":
                    content = content[:half]
                elif fault == "corrupt":
                    content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
                self.send_response(200 if span is None or fault == "whole" else 206)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                pieces = 12 if fault == "trickle" else 1
                content = content[:half] if fault == "drop" else content
                for piece in range(pieces):
                    start, end = (len(content) * n // pieces for n in (piece, piece + 1))
                    server.release.wait(0.2 * (pieces > 1))
                    self.wfile.write(content[start:end])
                self.close_connection = fault == "drop"

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def s3_server() -> Iterator[None]:
    """Run a server for S3 that this process and its children find by their environment."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # each request is worth a line to it
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        **_NO_PROXY,
    }
    with mock.patch.dict(os.environ, settings):
        # What an earlier one was given is kept by the module, not by the server.
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        yield
    server.stop()


def upload(folder: Path, url: str) -> None:
    """Copy the files of a folder below an s3:// URL, whose bucket is made."""
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir(url.removeprefix("s3://").split("/")[0])
    for path in folder.iterdir():
        files.pipe(f"{url}/{path.name}", path.read_bytes())
