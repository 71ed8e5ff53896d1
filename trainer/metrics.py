"""MetricLogger and its sinks: console, metrics.jsonl, TensorBoard.

Per-step values stay on the device; they are averaged over an interval, reduced over the ranks and
read one interval late, so that the hot path never waits for the host.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from .control import Control


@dataclass
class _Interval:
    """Values of one log interval, on their way from the device to the sinks."""

    step: int
    names: tuple[str, ...]
    means: Tensor
    work: dist.Work | None
    host: dict[str, float]


class MetricLogger:
    """Reports a run. All ranks call it alike; rank 0 writes, while no newer start has begun.

    `nothing_learnt_at` is the last step of the interval reported last, if every update in it was
    left out, else None.
    """

    def __init__(
        self,
        control: Control,
        *,
        step: int,
        total_steps: int,
        every: int,
        batch_size: int,
    ) -> None:
        self.every = every
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.sinks = _Sinks(control, step, total_steps) if dist.get_rank() == 0 else None
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._data_seconds = 0.0
        self._since = time.perf_counter()
        self._pending: _Interval | None = None
        self.nothing_learnt_at: int | None = None

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside (evaluation) out of the throughput."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def train(self, step: int, values: dict[str, Tensor], *, lr: float) -> None:
        """Take the device scalars of the optimizer step that made `step`."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        if step % self.every == 0 or step == self.total_steps:
            interval = self._close_interval(step, lr)
            self.flush()
            self._pending = interval

    def _close_interval(self, step: int, lr: float) -> _Interval:
        seconds = time.perf_counter() - self._since
        means = torch.stack(list(self._sums.values())) / (self._steps * dist.get_world_size())
        host = {
            "lr": lr,
            "images_per_second": self._steps * self.batch_size / seconds,
            "data_wait": self._data_seconds / seconds,
            "memory_gib": _memory_gib(means.device),
        }
        names = tuple(self._sums)
        work = dist.all_reduce(means, async_op=True)
        self._sums, self._steps, self._data_seconds = {}, 0, 0.0
        self._since = time.perf_counter()
        return _Interval(step, names, means, work, host)

    def flush(self) -> None:
        """Report the interval that is still on its way."""
        if self._pending is None:
            return
        interval, self._pending = self._pending, None
        if interval.work is not None:
            interval.work.wait()
        reduced = dict(zip(interval.names, interval.means.tolist(), strict=True))
        # A mean over steps and ranks: rounding may keep it a little below 1.
        learnt_nothing = reduced.get("skipped", 0.0) > 0.999
        self.nothing_learnt_at = interval.step if learnt_nothing else None
        if self.sinks is not None:
            self.sinks.write("train", interval.step, {**reduced, **interval.host})

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Report something that happened at `step`, such as an evaluation."""
        if self.sinks is not None:
            self.sinks.write(kind, step, values)

    def config(self, text: str) -> None:
        """Show the run's configuration in TensorBoard."""
        if self.sinks is not None:
            self.sinks.board.add_text("config", f"```json\n{text}```")

    def images(self, step: int, images: Tensor, *, name: str = "train/inputs") -> None:
        """Show images uint8 [N, H, W, 3] in TensorBoard, as a grid."""
        if self.sinks is not None:
            self.sinks.board.add_image(name, _grid(images), step, dataformats="HWC")
            self.sinks.board.flush()

    def close(self) -> None:
        """Close the files, in which all that was reported then stands; asks no other rank."""
        if self.sinks is not None:
            self.sinks.close()


class _Sinks:
    """Where rank 0 writes."""

    def __init__(self, control: Control, step: int, total_steps: int) -> None:
        # Imported here: it takes seconds, which only the rank that writes should spend.
        from torch.utils.tensorboard import SummaryWriter

        self.control = control
        run_dir = control.run_dir
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self.jsonl = _open_lines(run_dir / "metrics.jsonl")
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
            dynamic_ncols=True,
        )
        self.total_steps = total_steps
        self._last = (step, time.perf_counter())

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if not self.control.owns_folder():
            return
        line = {"kind": kind, "step": step, "time": time.time()}
        line |= {name: value if _is_json(value) else None for name, value in values.items()}
        self.jsonl.write(json.dumps(line, allow_nan=False) + "\n")
        self.jsonl.flush()
        if kind in ("train", "eval"):
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)
        if kind == "train":
            self._progress(step, values)
        else:
            self.say(f"{kind:<5} step {step:>7}  {_spell(values)}")
            self.board.flush()

    def say(self, line: str) -> None:
        """Print a line without tearing the progress bar, and to this rank's log."""
        tqdm.write(line)
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)

    def _progress(self, step: int, values: dict[str, Any]) -> None:
        before, then = self._last
        self._last = (step, time.perf_counter())
        per_step = (self._last[1] - then) / max(step - before, 1)
        if not self.bar.disable:
            self.bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{values['lr']:.1e}")
            self.bar.update(step - self.bar.n)
            return
        eta = tqdm.format_interval((self.total_steps - step) * per_step)
        self.say(f"train step {step:>7}/{self.total_steps}  {_spell(values)}  eta {eta}")

    def close(self) -> None:
        self.bar.close()
        self.jsonl.close()
        self.board.close()


def _open_lines(path: Path) -> Any:
    """Open a JSON-lines file to append, ending a line that a killed process left torn."""
    file = path.open("a+b")
    if file.tell() > 0:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.close()
    return path.open("a")


def _is_json(value: Any) -> bool:
    """Return whether JSON knows the value: it has neither infinity nor NaN."""
    return not isinstance(value, float) or math.isfinite(value)


def _spell(values: dict[str, Any]) -> str:
    """Format values for people."""
    words = []
    for name, value in values.items():
        if isinstance(value, float):
            value = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
        if "_stage" not in name:  # they are in the files
            words.append(f"{name} {value}")
    return "  ".join(words)


def _grid(images: Tensor) -> Tensor:
    """Lay N images [N, H, W, 3] out as one [rows·H, columns·W, 3], nearly square."""
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = torch.zeros(rows * columns, height, width, 3, dtype=images.dtype)
    canvas[:count] = images
    grid = canvas.view(rows, columns, height, width, 3).permute(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, 3)


def _memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process, in GiB: the device's, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
