"""Which form of an operator computes it: its definition, or a faster one.

A form is an autograd function that takes and returns what the definition does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import Function

FASTER: dict[str, type[Function]] = {}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_forced: str | None = None


def exporting() -> bool:
    """Return whether what is computed now is recorded as a graph for other runtimes.

    Nothing may then be chosen by the sizes, which are symbols, and operators that have one take
    the form in `exported`.
    """
    return torch.compiler.is_exporting()


def choose(op: str, *, device: str, dtype: torch.dtype) -> str:
    """Return "triton" or "eager", the form of an operator for maps of a dtype on a device."""
    fits = op in FASTER and device == "cuda" and dtype in _DTYPES
    return "triton" if fits else "eager"


def faster(op: str, x: Tensor) -> type[Function] | None:
    """Return the form of an operator for the map `x`, if it is not to be its definition."""
    if exporting():
        return None
    name = _forced or choose(op, device=x.device.type, dtype=x.dtype)
    return FASTER.get(op) if name == "triton" else None


def form(op: str, definition: type[Function], x: Tensor) -> type[Function]:
    """Return the form of an operator for the map `x`: its definition, or a faster one."""
    return faster(op, x) or definition


@contextmanager
def force(name: str) -> Iterator[None]:
    """Let every operator of which there is a form `name`, "triton" or "eager", have that form."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
