"""Faults on purpose: a save is broken at every place there is, and the run has to go on.

`python -m tests.trainer.faults` kills the writer before every system call of a save that changes
the disk, tears every write, loses what was not yet synced, alters bytes of every file and fills the
disk; after each it starts the run again. It prints a tally and fails if a run was lost: one that
does not go on from the newest good checkpoint, bit for bit, or does not say what it skips.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.trainer.disk import on_small_disk
from trainer import manifest
from trainer.checkpoint import Checkpointer, read_state
from trainer.config import UserError

ROOT = Path(__file__).parents[2]
CALLS = ("write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
MODEL = "m"
KILLED, TORN, UNSYNCED = "killed before", "torn", "power lost before"


class Scenario(NamedTuple):
    """A run as it stands, the step that `world_size` ranks then save, and where it may go on."""

    name: str
    prepare: Callable[[Path], None]
    step: int
    world_size: int
    resumes: tuple[int, ...]
    by_local_disk: bool = False


def nothing(root: Path) -> None:
    """Leave the run as it is."""


def leave_leftovers(root: Path) -> None:
    """What earlier crashes leave: a torn save, half a removal, a replacement cut in the middle."""
    for name in ("writing_0000000004_by_00001", "removed_writing_0000000002_by_00001"):
        (root / name).mkdir()
        (root / name / "rank_00000.safetensors").write_bytes(b"torn")
    step = manifest.step_folder(root, 3)
    step.rename(root / f"replaced_{step.name}")


SCENARIOS = (
    Scenario("a save", nothing, 4, 1, (3, 4)),
    Scenario("a step saved again", nothing, 3, 1, (3,)),
    Scenario("after a crash", leave_leftovers, 4, 1, (3, 4)),
    Scenario("two ranks", nothing, 4, 2, (3, 4)),
    Scenario("by a local disk", nothing, 4, 1, (3, 4), by_local_disk=True),
)


def alter(path: Path, place: int) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x90
    path.write_bytes(content)


DAMAGES = {"a byte altered": alter, "a file cut short": os.truncate}


def state_of(step: int) -> dict[str, torch.Tensor]:
    """The training state of a step."""
    generator = torch.Generator().manual_seed(step)
    shapes = ((5, 3), (8,), (2, 2, 2))
    state = {f"weight/{i}": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
    return state | {"step": torch.tensor(float(step))}


def start(
    root: Path, rank: int = 0, world_size: int = 1, *, by_local_disk: bool = False
) -> Checkpointer:
    """Begin a start of the run, in a process that has not begun one."""
    store = dist.FileStore(str(root.with_name("store")), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    local_dir = root.with_name("local") if by_local_disk else None
    return Checkpointer(root, group, keep_last=2, local_dir=local_dir)


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(state_of(step).items(), step, {"model": MODEL, "step": step}, keep=None)
        checkpointer.wait()


def write(root: Path, rank: int, scenario: Scenario, doomed: int, at: int, how: str) -> None:
    """Save as one rank; the `doomed` one ends at its call number `at`."""
    if rank == doomed:
        arm(root.with_name("calls"), at, how)
    checkpointer = start(root, rank, scenario.world_size, by_local_disk=scenario.by_local_disk)
    save(checkpointer, scenario.step)


def arm(record: Path, at: int, how: str) -> None:
    """Count the calls that change the disk, end at number `at`, note all in `record` before it."""
    count = itertools.count()
    kill = os.kill
    calls = record.open("w")

    def armed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if next(count) == at:
                if how == TORN:
                    call(args[0], args[1][: len(args[1]) // 2])
                if how == UNSYNCED:
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                kill(os.getpid(), signal.SIGKILL)
            is_file = name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode)
            print(name, is_file, file=calls, flush=True)
            return call(*args, **options)

        return counted

    for name in CALLS:
        setattr(os, name, armed(name, getattr(os, name)))


def restart(root: Path) -> None:
    """Go on as a start of the run does, leave the step it goes on from, save and load once more."""
    checkpointer = start(root, by_local_disk=True)
    print(json.dumps(load(checkpointer)), file=root.with_name("resumed").open("w"), flush=True)
    save(checkpointer, 9)
    assert load(checkpointer) == 9
    assert all(
        path.name == "generation" or path.name.startswith("step_") for path in root.iterdir()
    )


def load(checkpointer: Checkpointer) -> int:
    """Load the newest good checkpoint and return its step; what is loaded is its state."""
    state = {name: torch.zeros_like(tensor) for name, tensor in state_of(0).items()}
    newest = checkpointer.newest(model=MODEL)
    assert newest is not None, "the run begins anew"
    folder, record = newest
    read_state(folder, state, whole=True)
    for name, tensor in state_of(record["step"]).items():
        assert torch.equal(state[name], tensor), name
    return int(record["step"])


def in_children(folder: Path, *tasks: Callable[[], None]) -> list[int]:
    """Run each task in a fork of this process, which has no threads; return the exit codes.

    What they print is in the file `said`.
    """
    children = []
    (folder / "store").unlink(missing_ok=True)
    for task in tasks:
        child = os.fork()
        if child == 0:
            said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    task()
                    code = 0
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


class Harness:
    """Tries faults in a folder and keeps the tally."""

    def __init__(self, folder: Path, *, stride: int) -> None:
        self.folder = folder
        self.stride = stride
        self.root = folder / "checkpoints"
        self.tally: Counter[str] = Counter()
        self.lost: list[str] = []
        self._turn = itertools.count()
        base = folder / "base"
        base.mkdir()
        assert in_children(folder, lambda: save(start(base), 2, 3)) == [0], self.said()
        self._base = base

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def renew(self, prepare: Callable[[Path], None] = nothing) -> None:
        for folder in (self.root, self.folder / "local"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._base, self.root)
        prepare(self.root)

    def is_due(self) -> bool:
        return next(self._turn) % self.stride == 0

    def check(self, kind: str, name: str, resumes: tuple[int, ...], skipped: str = "") -> None:
        """Start the run again after a fault, and count."""
        self.tally[kind] += 1
        resumed = self.folder / "resumed"
        resumed.unlink(missing_ok=True)
        (code,) = in_children(self.folder, lambda: restart(self.root))
        step = json.loads(resumed.read_text()) if resumed.exists() else None
        if code != 0 or step not in resumes or skipped not in self.said():
            self.lost.append(f"{kind}, {name}: resumed at {step}\n{self.said()}")

    def kill(self, scenario: Scenario) -> None:
        """Break a save at every call of every rank."""
        for doomed in range(scenario.world_size):
            self._write(scenario, doomed, -1, "")
            calls = (self.folder / "calls").read_text().splitlines()
            for at, how in self._faults(calls):
                if self.is_due():
                    codes = self._write(scenario, doomed, at, how)
                    assert codes[doomed] == -signal.SIGKILL, self.said()
                    name = f"rank {doomed}, {how} call {at}: {calls[at].split()[0]}"
                    self.check(scenario.name, name, scenario.resumes)

    def _write(self, scenario: Scenario, doomed: int, at: int, how: str) -> list[int]:
        self.renew(scenario.prepare)
        ranks = range(scenario.world_size)
        tasks = (partial(write, self.root, rank, scenario, doomed, at, how) for rank in ranks)
        return in_children(self.folder, *tasks)

    @staticmethod
    def _faults(calls: list[str]) -> Iterator[tuple[int, str]]:
        for at, call in enumerate(calls):
            yield at, KILLED
            if call.startswith("write"):
                yield at, TORN
            if call == "fsync True":
                yield at, UNSYNCED

    def fill(self) -> None:
        """Let a save find fewer and fewer pages of the disk free."""
        for pages in range(16):
            if self.is_due():
                self.renew()
                codes = in_children(self.folder, partial(save_on_full_disk, self.root, pages))
                filler_of(self.root).unlink()
                assert codes == [0], self.said()
                self.check("a full disk", f"{pages} pages left", (3, 4))

    def damage(self) -> None:
        """Harm every file of the newest checkpoint, and the generation, at several places."""
        newest = manifest.step_folder(self._base, 3)
        for path in (*newest.iterdir(), self._base / "generation"):
            size = path.stat().st_size
            places = sorted({0, *range(7, size, 1 + size // 12), size - 1})
            for place, (kind, harm) in itertools.product(places, DAMAGES.items()):
                if self.is_due():
                    self.renew()
                    harmed = self.root / path.relative_to(self._base)
                    harm(harmed, place)
                    # The generation can be had from the checkpoints; the rest cannot.
                    lost = path.name != "generation"
                    resumes, skipped = ((2,), str(harmed)) if lost else ((3,), "")
                    self.check(kind, f"{path.name} at {place}", resumes, skipped)


def filler_of(root: Path) -> Path:
    """What fills the disk beside a run's checkpoints."""
    return root.with_name("filler")


def save_on_full_disk(root: Path, pages: int) -> None:
    """A start that finds `pages` pages free: it saves, or ends in a message for its user."""
    checkpointer = start(root)
    with filler_of(root).open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(file.tell() - pages * 4096, 0))
    with contextlib.suppress(UserError):
        save(checkpointer, 4)


def on_its_disk(folder: Path, *, stride: int) -> list[str]:
    """Return the command that tries the faults in `folder`, which gets a small disk of its own."""
    command = [sys.executable, "-m", "tests.trainer.faults", "--stride", str(stride)]
    return on_small_disk(folder, [*command, "--folder", str(folder)], num_bytes=2**21)


def main() -> int:
    """Try the faults; returns 1 if a run was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.trainer.faults", description=__doc__)
    parser.add_argument("--stride", type=int, default=1, help="try every so many of the faults")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is None:
        with tempfile.TemporaryDirectory(prefix="faults-") as name:
            command = on_its_disk(Path(name), stride=options.stride)
            return subprocess.run(command, cwd=ROOT, check=False).returncode
    torch.set_num_threads(1)
    harness = Harness(options.folder, stride=options.stride)
    for scenario in SCENARIOS:
        harness.kill(scenario)
    harness.damage()
    harness.fill()
    for kind, count in harness.tally.items():
        print(f"{count:5d} {kind}")
    print(*harness.lost, f"{harness.tally.total()} faults, {len(harness.lost)} lost runs", sep="\n")
    return 1 if harness.lost else 0


if __name__ == "__main__":
    sys.exit(main())
