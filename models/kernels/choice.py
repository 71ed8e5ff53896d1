"""Which form of an operator computes it: its definition, or a faster one.

A form is an autograd function that takes and returns what the definition does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

Definition = TypeVar("Definition")

FASTER: dict[str, type[Function]] = {}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_forced: str | None = None


def choose(op: str, *, device: str, dtype: torch.dtype) -> str:
    """Return "triton" or "eager", the form of an operator for maps of a dtype on a device."""
    fits = op in FASTER and device == "cuda" and dtype in _DTYPES
    return "triton" if fits else "eager"


def form(op: str, definition: Definition, x: Tensor) -> type[Function] | Definition:
    """Return the form of an operator for the map `x`: its definition, or a faster one.

    The definition is None for an operator that is defined by a plain function.
    """
    name = _forced or choose(op, device=x.device.type, dtype=x.dtype)
    return FASTER.get(op, definition) if name == "triton" else definition


@contextmanager
def force(name: str) -> Iterator[None]:
    """Let every operator of which there is a form `name`, "triton" or "eager", have that form."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
