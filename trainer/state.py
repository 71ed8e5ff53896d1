"""TrainState: where a run stands, and the arithmetic of steps, epochs and images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from data.base import Cursor


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything of a run that is neither a tensor nor a function of something else.

    `step` counts optimizer steps done; `cursor` is where the data stream goes on; `best` is the
    highest top-1 of an evaluation so far (in percent) and `best_step` the step that had it;
    `evaluated_step` is the step of the last evaluation that was not cut short, 0 before the first.
    """

    step: int
    cursor: Cursor
    best: float = 0.0
    best_step: int | None = None
    evaluated_step: int = 0

    def advance(self, cursor: Cursor) -> TrainState:
        """Return the state after one more optimizer step that consumed data up to `cursor`."""
        return replace(self, step=self.step + 1, cursor=cursor)

    def judge(self, top1: float) -> TrainState:
        """Return the state after an evaluation, which may have been the best."""
        judged = replace(self, evaluated_step=self.step)
        if self.best_step is not None and top1 <= self.best:
            return judged
        return replace(judged, best=top1, best_step=self.step)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form, under 1 KB."""
        return {**vars(self), "cursor": self.cursor.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Read what to_dict() returned."""
        return cls(**{**values, "cursor": Cursor.from_dict(values["cursor"])})
