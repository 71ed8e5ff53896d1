"""How kernels are started, or only noted: to be built, or counted, where no GPU is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A kernel with the grid, the arguments and the options that it is started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_noted: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a Triton kernel on a grid of programs."""
    if _noted is None:
        kernel[grid](*arguments, **options)
    else:
        _noted.append(Launch(kernel, grid, arguments, options))


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Start nothing, and list what would have been started."""
    global _noted
    _noted = []
    try:
        yield _noted
    finally:
        _noted = None
