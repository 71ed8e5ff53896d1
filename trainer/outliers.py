"""When one of several equals stands out: median and median absolute deviation.

Torch-free. Used on ranks while a run goes on, and on nodes before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

FEWEST = 3
"""Values among which one can stand out."""
_DEVIATIONS = 5.0  # from the median, in robust standard deviations
_NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


def usual(values: Sequence[float], *, share: float) -> tuple[float, float]:
    """Return the median of `values`, and how far from it one of them may lie.

    That is `share` of the median at the least: values that are equal to a hair differ too.
    """
    median = statistics.median(values)
    spread = _NORMAL * statistics.median(abs(value - median) for value in values)
    return median, max(_DEVIATIONS * spread, share * abs(median))
