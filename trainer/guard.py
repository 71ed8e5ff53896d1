"""The guard: which updates count, and a record of the last steps for when something goes wrong.

A loss is a spike where it lies further above the median of the steps before it than `guard.spike`
times their median absolute deviation. Invariants: what decides about an update is computed on the
device, from what all ranks share, so that nobody waits and all decide alike; what people are told
is read an interval later.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.base import Batch, Cursor

from .manifest import write_atomically
from .schedule import Hyper
from .sections import GuardConfig

_FEWEST = 16  # losses, before which nothing is known of how much they vary


class BadNumericsError(RuntimeError):
    """Gradients were not finite for a whole log interval, or losses jumped too often."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss, a mean over all ranks, was above `limit`."""

    step: int
    loss: float
    limit: float


@dataclass
class _Entry:
    """One step as it was: `values` are device scalars, `read` the same once they were asked for."""

    step: int
    cursor: Cursor
    hyper: Hyper
    ids: Sequence[Tensor]
    values: dict[str, Tensor]
    read: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable form."""
        return {
            "step": self.step,
            "epoch": self.cursor.epoch,
            "samples": self.cursor.samples,
            **vars(self.hyper),
            **{k: v if math.isfinite(v) else str(v) for k, v in (self.read or {}).items()},
            "ids": [ids.tolist() for ids in self.ids],
        }


class Guard:
    """Judges the losses of a run's steps, and remembers this rank's last `config.record` steps.

    Those of the last two log intervals, of `every` steps, it remembers anyhow. `computes` says what
    the steps are computed by, for the record.
    """

    def __init__(
        self,
        config: GuardConfig,
        run_dir: Path,
        device: torch.device,
        *,
        every: int,
        computes: Mapping[str, object],
    ) -> None:
        self.config = config
        self._run_dir = run_dir
        self._computes = dict(computes)
        self._rollbacks = 0
        self._path = run_dir / "logs" / f"steps_{dist.get_rank():05d}.json"
        self._entries: deque[_Entry] = deque(maxlen=max(config.record, 2 * every))
        self._losses = torch.full((config.window,), torch.nan, device=device)
        self._seen = 0

    def judge(self, loss: Tensor) -> dict[str, Tensor]:
        """Return what to tell of a step, as device scalars.

        That is `spike`, 1.0 or 0.0, the `global_loss`, of which `loss` is this rank's part, and the
        `loss_limit` above which it is a spike. Nothing is one while few steps have been seen;
        nothing is told if spikes are not looked for.
        """
        if self.config.spike == 0:
            return {}
        total = loss.detach().clone()
        dist.all_reduce(total)
        total /= dist.get_world_size()
        median = self._losses.nanmedian()
        spread = (self._losses - median).abs().nanmedian()
        limit = median + self.config.spike * spread
        spike = (total > limit).float() * float(self._seen >= _FEWEST)
        self._losses[self._seen % self.config.window] = torch.where(spike > 0, torch.nan, total)
        self._seen += 1
        return {"spike": spike, "loss_limit": limit, "global_loss": total}

    def keep(self, verdict: dict[str, Tensor]) -> Tensor | None:
        """Return 1.0 where the update of a judged step counts, 0.0 where it does not."""
        if self.config.action == "skip" and verdict:
            return 1 - verdict["spike"]
        return None

    def note(
        self,
        step: int,
        cursor: Cursor,
        hyper: Hyper,
        batches: Sequence[Batch],
        values: dict[str, Tensor],
    ) -> None:
        """Remember the step that made `step` from the data at `cursor`."""
        ids = [batch.ids for batch in batches]
        self._entries.append(_Entry(step, cursor, hyper, ids, values))

    def examine(self, step: int) -> list[Spike]:
        """Return the spikes among the steps up to `step` that were not examined before.

        All ranks get the same. It waits for those steps to be computed.
        """
        fresh = [entry for entry in self._entries if entry.read is None and entry.step <= step]
        _read(fresh)
        return [
            Spike(entry.step, entry.read["global_loss"], entry.read["loss_limit"])
            for entry in fresh
            if entry.read is not None and entry.read.get("spike")
        ]

    def wants_rollback(self, spike: Spike) -> bool:
        """Return whether the weights are to go back to before `spike`, and write the record.

        Raises:
            BadNumericsError: if the run is to stop, or went back too often.
        """
        action, limit = self.config.action, self.config.max_rollbacks
        self.dump(f"the loss jumped at step {spike.step}")
        if action == "abort" or (action == "rollback" and self._rollbacks == limit):
            raise BadNumericsError(
                f"the loss jumped to {spike.loss:.4g} at step {spike.step}, above "
                f"{spike.limit:.4g}, after {self._rollbacks} rollbacks: look at it with `foveate "
                f"replay {self._run_dir} --step {spike.step}`, lower optim.lr or raise guard.spike"
            )
        return action == "rollback"

    def forget(self) -> None:
        """Begin to learn anew what losses are usual: the weights have gone back."""
        self._rollbacks += 1
        self._losses.fill_(torch.nan)
        self._seen = 0

    def to_dict(self) -> dict[str, Any]:
        """Return what it judges by, JSON-serialisable and equal on all ranks.

        `losses` are those in the window, oldest first, null for one that was a spike. It waits for
        the device.
        """
        losses = self._losses.tolist()
        window = [losses[index % len(losses)] for index in self._window()]
        return {"seen": self._seen, "losses": [x if math.isfinite(x) else None for x in window]}

    def take(self, values: dict[str, Any]) -> None:
        """Judge by what to_dict() returned, of a guard with any window."""
        self._seen, losses = values["seen"], values["losses"]
        for index, loss in zip(reversed(self._window()), reversed(losses), strict=False):
            self._losses[index % len(self._losses)] = math.nan if loss is None else loss

    def _window(self) -> range:
        """The numbers, counted from the first, of the losses that are compared with."""
        return range(max(self._seen - len(self._losses), 0), self._seen)

    def dump(self, why: str, *, wait: bool = True) -> None:
        """Write the record to RUN/logs/steps_00000.json, this rank's; without `wait` what is known.

        The disk may be full, which is then the trouble that is reported.
        """
        if wait:
            _read([entry for entry in self._entries if entry.read is None])
        steps = [entry.to_dict() for entry in list(self._entries)]
        record = {"why": why, "computes": self._computes, "steps": steps}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            write_atomically(self._path, json.dumps(record) + "\n")


def _read(entries: Sequence[_Entry]) -> None:
    """Bring the values of some steps to the host, all at once."""
    values = [value.float() for entry in entries for value in entry.values.values()]
    numbers = iter(torch.stack(values).tolist() if values else [])
    for entry in entries:
        entry.read = {name: next(numbers) for name in entry.values}
