"""Startup: where the time goes from the moment a run is asked for to its first training step.

What started this process says in FOVEATE_STARTED when it reached what, `name=seconds since 1970`
joined by commas, from the first on; the process goes on from there. Torch-free.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Mapping

from launcher.process import born

from .config import UserError

VARIABLE = "FOVEATE_STARTED"


class Startup:
    """The moments that a start has reached so far; the process's own begin with `python`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._moments = [*_read(environment.get(VARIABLE, "")), ("python", born())]

    def reached(self, name: str) -> None:
        """Note that the start has got as far as `name`."""
        self._moments.append((name, time.time()))

    def seconds(self) -> dict[str, float]:
        """Return what it took to reach each moment from the one before, and all of it as total."""
        taken = {
            name: round(max(0.0, moment - before), 2)  # clocks of two machines may differ
            for (_, before), (name, moment) in itertools.pairwise(self._moments)
        }
        return {**taken, "total": round(self._moments[-1][1] - self._moments[0][1], 2)}


def _read(text: str) -> list[tuple[str, float]]:
    """Read what FOVEATE_STARTED says.

    Raises:
        UserError: if it is something else.
    """
    moments = []
    for item in filter(None, text.split(",")):
        found = re.fullmatch(r"([a-z_]+)=([0-9]+(?:\.[0-9]+)?)", item)
        if found is None:
            raise UserError(f"{VARIABLE} holds {item!r}: expected name=seconds, or leave it unset")
        moments.append((found[1], float(found[2])))
    return moments
