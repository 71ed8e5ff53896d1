"""Verdicts: readings of all nodes -> rows that say of each whether it is as it should be.

Pure functions. Invariant: a node is judged by limits and by its peers alone, and equal nodes are
never told apart; what another node may be to blame for counts against nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.outliers import FEWEST, usual
from trainer.readings import Reading

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check of one node: its status, what was found, and what it was held against."""

    status: Status
    check: str
    host: str
    value: float | str
    where: str = ""
    unit: str = ""
    limit: str = ""


def judge(readings: Sequence[tuple[str, Reading]], silent: Collection[str] = ()) -> list[Row]:
    """Return a row for each (host, reading), in order.

    `silent` are hosts that hung or died: what others could not do together with them is a warning.
    """
    peers: dict[str, list[Reading]] = {}
    for _, reading in readings:
        peers.setdefault(reading.check, []).append(reading)
    return [_row(host, reading, peers[reading.check], silent) for host, reading in readings]


def _row(host: str, reading: Reading, peers: list[Reading], silent: Collection[str]) -> Row:
    value, limit = reading.value, ""
    if reading.error:
        value, good = reading.error, False
    elif isinstance(value, str):
        good, limit = _agrees(value, peers) if reading.better == "same" else (True, "")
    else:
        good, limit = _holds(value, reading, peers)
    excused = reading.joint and bool(set(silent) - {host})
    status: Status = "ok" if good else "warn" if excused else reading.worst
    return Row(
        status=status, check=reading.check, host=host, value=value, where=reading.where,
        unit="" if reading.error else reading.unit, limit=limit,
    )  # fmt: skip


def _agrees(value: str, peers: list[Reading]) -> tuple[bool, str]:
    """Return whether a value is what most say (where as many say another: the first of them)."""
    said = Counter(str(peer.value) for peer in peers if not peer.error)
    usual, count = said.most_common(1)[0]
    return value == usual, "" if len(said) == 1 else f"{usual} on {count} of {said.total()}"


def _holds(value: float, reading: Reading, peers: list[Reading]) -> tuple[bool, str]:
    """Return whether a number keeps all its limits, and the tightest of them."""
    high = reading.better == "high"
    limits = list(_limits(reading, peers))
    if not limits:
        return True, ""
    limit, why = (max if high else min)(limits)
    word = "at least" if high else "at most"
    return (value >= limit if high else value <= limit), f"{word} {number(limit)}{why}"


def _limits(reading: Reading, peers: list[Reading]) -> Iterator[tuple[float, str]]:
    if reading.limit is not None:
        yield reading.limit, ""
    values = [float(peer.value) for peer in peers if not peer.error]
    if reading.share is not None and len(values) >= FEWEST:
        median, distance = usual(values, share=reading.share)
        limit = median - distance if reading.better == "high" else median + distance
        if limit > 0:  # nodes that differ by all they have say nothing about one another
            yield limit, f" (median {number(median)})"


def bad_hosts(rows: Sequence[Row]) -> list[str]:
    """Return the hosts that failed a check, in order."""
    return list(dict.fromkeys(row.host for row in rows if row.status == "fail"))


def table(rows: Sequence[Row]) -> str:
    """Return a table: one line for all that is well in a check, and one for each other row."""
    lines = [("", "check", "node", "found", "limit")]
    for check in dict.fromkeys(row.check for row in rows):
        mine = [row for row in rows if row.check == check]
        good = [row for row in mine if row.status == "ok"]
        if good:
            hosts = list(dict.fromkeys(row.host for row in good))
            node = hosts[0] if len(hosts) == 1 else f"{len(hosts)} nodes"
            lines.append(("ok", check, node, _span(good), good[0].limit))
        lines += [
            (row.status, check, f"{row.host} {row.where}".strip(), _found(row), row.limit)
            for row in mine
            if row.status != "ok"
        ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[3] = min(widths[3], 44)  # a long message pushes only its own limit aside
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _span(rows: list[Row]) -> str:
    """Return the value of rows, or from where to where their values reach."""
    values = sorted({row.value for row in rows if not isinstance(row.value, str)})
    if not values:
        return ", ".join(dict.fromkeys(str(row.value) for row in rows))
    least, most = number(values[0]), number(values[-1])
    span = least if least == most else f"{least} … {most}"
    return f"{span} {rows[0].unit}".rstrip()


def _found(row: Row) -> str:
    text = row.value if isinstance(row.value, str) else number(row.value)
    return f"{text} {row.unit}".rstrip()


def number(value: float) -> str:
    """Return a number in four digits or so, without an exponent where it can be read without."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.1e}"
