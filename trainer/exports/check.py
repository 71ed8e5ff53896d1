"""What every check of an exported folder does; becomes part of its verify.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-4  # of the largest value: another machine rounds differently, block by block

Case = dict[str, Any]
"""Images and what the model gave of them: images, logits, map1 to map4."""


def cases(tensor: Callable[[bytearray, list[int]], Any]) -> list[Case]:
    """Return the cases of the sample; `tensor` makes an array of float32 bytes and a shape."""
    data = bytearray((HERE / "sample.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, Case] = {}
    for name, entry in json.loads(data[8:start]).items():
        case, _, name = name.rpartition(".")
        begin = start + entry["data_offsets"][0]
        end = begin + 4 * prod(entry["shape"])
        found.setdefault(case, {})[name] = tensor(data[begin:end], entry["shape"])
    return [found[case] for case in sorted(found)]


def batches(case: Case) -> Iterator[Case]:
    """Yield a case as it is, its first image alone, and a batch of three."""
    last = len(case["images"]) - 1
    for rows in ([*range(last + 1)], [0], [last, 0, last]):
        yield {name: values[rows] for name, values in case.items()}


def agree(by: str, found: Case, told: Case) -> None:
    """Print how far what a library found lies from what was told, or end in what is wrong."""
    worst = {"logits": 0.0, "maps": 0.0}
    for name, value in found.items():
        expected = told[name]
        if tuple(value.shape) != tuple(expected.shape):
            sys.exit(f"{by}: {name} has shape {tuple(value.shape)}, not {tuple(expected.shape)}")
        difference = float(abs(value - expected).max() / abs(expected).max())
        kind = "logits" if name == "logits" else "maps"
        if not difference <= worst[kind]:
            worst[kind] = difference
    said = ", ".join(
        f"{kind} differ by {worst[kind]:.1e}"
        for kind in worst
        if any((name == "logits") == (kind == "logits") for name in found)
    )
    size = "x".join(map(str, told["images"].shape))
    if not all(difference <= TOLERANCE for difference in worst.values()):
        sys.exit(f"{by}, images {size}: {said} of the largest")
    print(f"verified by {by}, images {size}: {said} of the largest")


def without_foveate() -> None:
    """See to it that an installed Foveate does not help: importing it fails from here on."""
    for package in ("launcher", "trainer", "models", "data"):
        sys.modules[package] = None  # type: ignore[assignment]
    sys.path.insert(0, str(HERE))
