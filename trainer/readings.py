"""Readings: what a node check found, and the lines in which a checking process says so.

Torch-free. Every line is a whole message by itself, so that what a process said before it hung or
died still counts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

DONE = "done"
"""What a process turns to after its last check."""
_LONGEST = 400  # characters of an error: lines below PIPE_BUF (4096) do not mix in a shared pipe


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One finding about a node, and by what it is to be judged.

    `where` names the part of the node, such as GPU 3. A number is held against `limit`, and against
    the other readings of the same check: it may be worse than their median by `share` of it. What
    is to be the `same` is held against what most nodes say. `worst` is the status of a reading that
    does not hold. An `error` is a check that could not be made; one of a `joint` check may be
    another node's fault.
    """

    check: str
    value: float | str = ""
    unit: str = ""
    where: str = ""
    better: Literal["high", "low", "same"] = "high"
    limit: float | None = None
    share: float | None = None
    worst: Literal["warn", "fail"] = "fail"
    error: str = ""
    joint: bool = False


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one process says: what it is `doing` from now on, or a reading.

    `step` is the Slurm step it belongs to, such as 12.0, if any. `joint` says that what it does
    takes the others too, so that one of them may be to blame if it never ends.
    """

    rank: int
    host: str
    step: str = ""
    doing: str = ""
    joint: bool = False
    reading: Reading | None = None

    def line(self) -> bytes:
        """Return the message as one line."""
        return json.dumps(asdict(self)).encode() + b"\n"


def message(line: bytes) -> Message | None:
    """Return the message of a line, or None for anything else that a library may have printed."""
    try:
        found = json.loads(line)
        reading = found.pop("reading")
        return Message(**found, reading=None if reading is None else Reading(**reading))
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def failed(check: str, error: Exception, *, joint: bool = False) -> Reading:
    """Return the reading of a check that ended in an exception."""
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Reading(check=check, error=said[:_LONGEST], joint=joint)
