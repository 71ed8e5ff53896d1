"""The demonstration: real images, two processes, a crash in the middle, a resume, an export.

It drives the same commands that a user types and reads only what they leave in the run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.config import RunConfig, override
from trainer.recipes import recipe

from . import rundir
from .local import Workers, launch, num_gpus, python_environment

NUM_PROCESSES = 2
CRASH_AFTER = 0.4
"""Share of the steps after which the first checkpoint is followed by a crash."""

EXPLAINED = (2, 75)
"""Exit codes of a step that has already said in one line why it ended."""


def run(overrides: Sequence[str] = ()) -> int:
    """Pretrain the recipe `demo` on CIFAR-10 with two processes, and return the exit code.

    The images are fetched and packed if they are not there. Past 40 % of the steps, once a
    checkpoint is complete, all processes of the run are killed; the run is started again and goes
    on from that checkpoint. At the end the weights are exported for timm. A run that is complete
    already is only summed up. With fewer than two GPUs it all happens on the CPU.
    """
    if num_gpus() < NUM_PROCESSES:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two processes cannot share one
    config = override(recipe("demo"), overrides)
    seconds: dict[str, float] = {}
    try:
        run_dir = rundir.prepare(config)
        bundle = run_dir / "exports" / "timm"
        if finished(run_dir):
            print(f"{run_dir} is complete: remove it to start anew")
        else:
            with _timed(seconds, "data"):
                _fetch(config)
            with _timed(seconds, "training"):
                _pretrain(run_dir)
        if not bundle.exists():
            with _timed(seconds, "export"):
                _call("launcher", "export", run_dir, "--format", "timm", "--out", bundle)
    except _StepFailed as failed:
        if failed.code not in EXPLAINED:
            print(f"error: the demonstration stopped at: {failed}", file=sys.stderr)
        return failed.code
    print(summary(run_dir, bundle, seconds))
    return 0


class _StepFailed(Exception):
    """A step of the demonstration ended with an exit code other than 0."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(f"{step} (exit code {code})")
        self.code = code


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[step] = time.monotonic() - started


def _call(module: str, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    code = subprocess.run(command, env=python_environment(rundir.CODE)).returncode
    if code != 0:
        raise _StepFailed(" ".join(map(str, arguments[:2])), code if code > 0 else 128 - code)


def _fetch(config: RunConfig) -> None:
    """Fetch CIFAR-10, which does nothing if it is there, unless other data are asked for."""
    usual = recipe("demo").data
    if (config.data.source, config.data.train) == (usual.source, usual.train):
        _call("data", "fetch", "cifar10", "--out", Path(config.data.train).parent)


def _pretrain(run_dir: Path) -> None:
    """Train to the end, with one crash on the way unless the run is past that point already."""
    if crash_point(run_dir) is None:
        with Workers(run_dir, num_processes=NUM_PROCESSES) as workers:
            point = None
            while point is None and workers.running(seconds=0.2):
                point = crash_point(run_dir)
            # It ended before, by a failure or by too few checkpoints, or was asked to.
            if point is None or workers.asked:
                _check(workers.exit_code())
                return
            workers.kill()
        print(
            f"\ncrash: killed all {NUM_PROCESSES} workers by SIGKILL after the checkpoint of step "
            f"{point}; starting the same run again",
            flush=True,
        )
    _check(launch(run_dir, num_processes=NUM_PROCESSES))


def _check(code: int) -> None:
    if code != 0:
        raise _StepFailed("pretraining", code)


def crash_point(run_dir: Path) -> int | None:
    """Return the step of the first complete checkpoint past 40 % of the run, or None."""
    starts = [line for line in metrics(run_dir) if line["kind"] == "start"]
    if not starts:
        return None
    manifests = (run_dir / "checkpoints").glob("step_*/MANIFEST.json")
    steps = sorted(int(path.parent.name.removeprefix("step_")) for path in manifests)
    return next((step for step in steps if step > CRASH_AFTER * starts[-1]["steps"]), None)


def finished(run_dir: Path) -> bool:
    """Return whether the run has ended by reaching its last step."""
    lines = metrics(run_dir)
    total = max((line["steps"] for line in lines if line["kind"] == "start"), default=None)
    return any(line["kind"] == "end" and line["step"] == total for line in lines)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of RUN/metrics.jsonl; one that a crash cut short is left out."""
    lines = []
    file = run_dir / "metrics.jsonl"
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def summary(run_dir: Path, bundle: Path, seconds: dict[str, float]) -> str:
    """Return what a run reached and where everything is, with the seconds each step took."""
    result = [line for line in metrics(run_dir) if line["kind"] == "eval"][-1]
    tensorboard = Path(sys.executable).with_name("tensorboard")
    times = ", ".join(f"{name} {took:.0f} s" for name, took in seconds.items() if took >= 1)
    return "\n".join(
        [
            "",
            f"top-1 on the test images  {_percent(result, 'top1')}",
            f"top-1 with EMA weights    {_percent(result, 'ema_top1')}",
            *([f"time                      {times}"] if times else []),
            f"run folder                {_short(run_dir)}",
            f"TensorBoard logs          {_short(run_dir / 'tensorboard')}",
            f"exported bundle           {_short(bundle)}",
            f"look at it                {_short(tensorboard)} --logdir {_short(run_dir)}",
        ]
    )


def _percent(result: dict[str, Any], name: str) -> str:
    value = result.get(name)
    return "-" if value is None else f"{value:.2f} %"


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
