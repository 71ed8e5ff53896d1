"""Progress of long work: a bar on a terminal's standard error, lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Say = Callable[[str], None]


@contextmanager
def counting(
    total: int, unit: str, say: Say, *, finished: int = 0
) -> Iterator[Callable[[int, str], None]]:
    """Yield `done(amount, line)`, to be called as parts of `total` are finished.

    On a terminal it moves a bar; elsewhere it says the line of the part that completes a tenth.
    So much was `finished` before.
    """
    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=finished,
        unit=unit,
        file=sys.stderr,
        disable=not on_terminal,
        dynamic_ncols=True,
    ) as bar:

        def done(amount: int, line: str) -> None:
            nonlocal finished
            tenths, finished = finished * 10 // max(total, 1), finished + amount
            bar.update(amount)
            if not on_terminal and finished * 10 // max(total, 1) > tenths:
                say(line)

        yield done
