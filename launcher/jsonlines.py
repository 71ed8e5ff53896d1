"""Files of one JSON object per line, such as metrics.jsonl, read while others append to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAIL = 2**16
"""Bytes: well over 100 lines of metrics.jsonl."""


def tail(path: Path) -> bytes:
    """Return the end of a file, all of it if it is small.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        return file.read()


def objects(text: bytes) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a piece of a file; lines that are cut or damaged are none."""
    for line in text.split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
