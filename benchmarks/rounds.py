"""Fair timing on a machine that does other things: CPU seconds, rounds in turn, a yardstick.

Every pass of every method has a pass of one reference right before and right after it, in the same
process, so that whatever slows the machine down falls on both; only the ratio means anything.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping, Sequence
from statistics import median

Pass = Callable[[int], int]  # does the work of a round and returns how many images that were
Spent = dict[str, list[tuple[float, float]]]  # by method, of each round: seconds an image, ratio


def cpu_seconds() -> float:
    """Return what this process and its children, those that ended, have spent, kernel included."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(methods: Mapping[str, Pass], reference: Pass, rounds: int) -> Spent:
    """Run all methods in turn, `rounds` times after one for warming up."""
    spent: Spent = {name: [] for name in methods}
    order = list(methods)
    for index in range(rounds + 1):
        order.append(order.pop(0))  # nobody always follows the same neighbour
        before = _per_image(reference, index)
        for name in order:
            seconds = _per_image(methods[name], index)
            after = _per_image(reference, index)
            if index > 0:
                spent[name].append((seconds, 2 * seconds / (before + after)))
            before = after
    return spent


def full_decode(images: Sequence[bytes]) -> Pass:
    """Return the yardstick: whole files decoded by libjpeg-turbo, and nothing else."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:
        raise SystemExit(f"{error}: `pip install simplejpeg`, the yardstick") from error

    def run(index: int) -> int:
        del index
        for image in images:
            decode_jpeg(image)
        return len(images)

    return run


def report(spent: Spent, ours: Mapping[str, str]) -> None:
    """Print a JSON line for each method, and how many times faster ours are than the others.

    `ours` maps the methods that are ours to their names in the second kind of lines.
    """
    for name, passes in spent.items():
        ratios = [ratio for _, ratio in passes]
        row = {
            "name": name,
            "cpu_ms": round(1000 * median(seconds for seconds, _ in passes), 3),
            "ratio_to_simplejpeg": round(median(ratios), 3),
            "spread": _spread(ratios),
        }
        print(json.dumps(row), flush=True)
    rivals = [name for name in spent if name not in ours]
    for name, short in ours.items():
        for rival in rivals:
            pairs = zip(spent[rival], spent[name], strict=True)
            times = [theirs / own for (_, theirs), (_, own) in pairs]
            row = {"ours": short, "rival": rival, "times_faster": round(median(times), 2)}
            print(json.dumps({**row, "spread": _spread(times)}), flush=True)


def skipped(name: str, reason: object) -> None:
    """Print the JSON line of a method that cannot be measured here."""
    print(json.dumps({"name": name, "skipped": str(reason)}), flush=True)


def _per_image(run: Pass, index: int) -> float:
    start = cpu_seconds()
    images = run(index)
    return (cpu_seconds() - start) / images


def _spread(values: list[float]) -> list[float]:
    return [round(value, 3) for value in (min(values), max(values))]
