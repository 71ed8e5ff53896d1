"""The state of a GPU as nvidia-smi tells it: queries as CSV, read into readings.

Torch-free. What a GPU or its driver does not know, nvidia-smi writes in brackets: `[N/A]`.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterator, Sequence

from .readings import Reading

STATE = (
    "driver_version",
    "temperature.gpu",
    "clocks.sm",
    "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.active",
)
"""What is asked of a GPU; newer drivers call throttle reasons event reasons, and know both."""
ROWS = ("remapped_rows.pending", "remapped_rows.failure")
"""What is asked of its memory's spare rows (from the A100 on)."""
PROCESSES = ("pid", "process_name", "used_memory")
"""What is asked of each process that computes on it."""

_HOTTEST = 87.0  # degrees Celsius; data-centre GPUs slow down at about 90
_SLOWED = {
    0x08: "the hardware slows it down",
    0x20: "it is too hot for its clock",
    0x40: "the hardware slows it down for heat",
    0x80: "the power supply slows it down",
}
"""The throttle reasons that are faults, by bit; idling and the power cap are none."""
_HELD = 512.0  # MiB that another process may hold: a context alone is about that


def command(gpu: str, kind: str, fields: Sequence[str]) -> list[str]:
    """Return the command that asks for `fields`; `kind` is gpu, remapped-rows or compute-apps."""
    query = f"--query-{kind}={','.join(fields)}"
    return ["nvidia-smi", "-i", gpu, query, "--format=csv,noheader,nounits"]


def listed() -> int:
    """Return how many GPUs nvidia-smi lists, 0 where there is no nvidia-smi.

    Raises:
        RuntimeError: if nvidia-smi fails, as where a GPU has fallen off the bus.
    """
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return 0
    if done.returncode != 0:
        raise RuntimeError(f"nvidia-smi fails: {(done.stdout + done.stderr).strip()}")
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def state_readings(text: str, where: str) -> Iterator[Reading]:
    """Read the answer about STATE: one line."""
    (values,) = _table(text, STATE)
    driver, temperature, clock, top, uncorrected, reasons = values
    # A newer or older driver on some nodes works, but is worth knowing.
    yield Reading(check="driver", value=driver or "unknown", better="same", worst="warn")
    if temperature is not None:
        yield Reading(
            check="temperature", where=where, value=float(temperature), unit="°C", better="low",
            limit=_HOTTEST, worst="warn",
        )  # fmt: skip
    if clock is not None and top is not None:
        yield Reading(
            check="clock of GPU", where=where, value=float(clock), unit="MHz", share=0.2,
            worst="warn",
        )  # fmt: skip
    if uncorrected is not None:
        yield Reading(
            check="ECC errors", where=where, value=float(uncorrected), better="low", limit=0.0
        )
    if reasons is not None:
        bits = int(reasons, 16)
        slowed = "; ".join(why for bit, why in _SLOWED.items() if bits & bit)
        yield Reading(check="throttling", where=where, value="none", error=slowed)


def row_readings(text: str, where: str) -> Iterator[Reading]:
    """Read the answer about ROWS: one line, or none where the GPU has no spare rows."""
    for pending, failure in _table(text, ROWS):
        bad = "a row of its memory could not be replaced" if _is_yes(failure) else ""
        yield Reading(check="memory rows", where=where, value="good", error=bad)
        if _is_yes(pending):
            said = "rows of its memory wait to be replaced: reset the GPU"
            yield Reading(check="memory rows", where=where, error=said, worst="warn")


def process_readings(text: str, where: str) -> Iterator[Reading]:
    """Read the answer about PROCESSES, asked before this process touched the GPU: strangers."""
    found = _table(text, PROCESSES)
    mib = sum(float(held) for _, _, held in found if held is not None)
    names = ", ".join(f"{name} ({pid})" for pid, name, _ in found[:3])
    error = f"{mib:,.0f} MiB are held by {names}" if mib > _HELD else ""
    yield Reading(check="strangers on GPU", where=where, value=mib, unit="MiB", error=error)


def _table(text: str, fields: Sequence[str]) -> list[list[str | None]]:
    """Return the cells of each line, None for what is not known.

    Raises:
        ValueError: if it is no answer about these fields.
    """
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    if any(len(row) != len(fields) for row in rows):
        raise ValueError(f"nvidia-smi answers {text.strip()!r} when asked for {','.join(fields)}")
    return [[None if _is_unknown(cell) else cell for cell in row] for row in rows]


def _is_unknown(cell: str) -> bool:
    return cell.startswith("[") or cell == "N/A"


def _is_yes(cell: str | None) -> bool:
    return cell is not None and cell.lower() in ("yes", "1")
