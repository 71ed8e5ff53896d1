"""Checkpointer: the canonical training state on disk, sharded, whole or not at all.

Every rank writes its share of every tensor into one file of its own, and reads from all of them
just what it holds: any number of ranks, sharded in any way, goes on from what any other number
wrote. Nothing in it is ever unpickled. When a folder counts as a checkpoint is
`trainer.manifest`'s subject.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import manifest, shardfile
from .config import UserError
from .group import gather
from .manifest import Fenced, Manifest
from .node_disk import NodeDisk
from .shardfile import Piece, ShardFile
from .shares import DTYPES, HostCopy, held

T = TypeVar("T")

State = dict[str, Tensor]
"""Canonical training state: a name such as `weight/head.bias` -> fp32 tensor or DTensor."""


class Checkpointer:
    """Saves and loads the checkpoints of one run folder; used by all ranks alike.

    One save is under way at most. `group` is a gloo group over all ranks that nothing else uses,
    since a save in the background talks over it while training goes on.
    """

    def __init__(
        self,
        root: Path,
        group: dist.ProcessGroup,
        *,
        keep_last: int,
        keep_every: int | None = None,
        local_dir: Path | None = None,
    ) -> None:
        self.root = root
        self.group = group
        self.keep_last = keep_last
        self.keep_every = keep_every
        try:
            self.generation = self._on_first(lambda: manifest.begin_generation(root))
        except OSError as error:
            raise UserError(f"cannot write to {root}: {error.strerror}") from None
        self._disk = None if local_dir is None else NodeDisk(local_dir, root)
        self._host = HostCopy(rank=group.rank(), world_size=group.size())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._safe = threading.Event()
        self.seconds = 0.0
        """What the last save took until it was safe; 0 before the first."""
        if self._disk is not None:
            self._carry_over(self._disk)

    def save(
        self,
        state: Iterable[tuple[str, Tensor]],
        step: int,
        record: dict[str, Any],
        *,
        keep: int | None,
    ) -> None:
        """Copy `state`, tensor by tensor, and write it in the background as that of `step`.

        Waits for an earlier save first. `record` is the JSON that load() returns, its `model` the
        network's name; `keep` names a step whose checkpoint retention must spare.

        Raises:
            UserError: if the earlier save failed, a full disk for one; older checkpoints stay.
        """
        self.wait()
        begin = time.monotonic()
        pieces = self._host.take(state)
        self._safe.clear()
        self._thread = threading.Thread(
            target=self._write_guarded, args=(begin, pieces, step, record, keep), name="checkpoint"
        )
        self._thread.start()

    def wait(self, seconds: float = math.inf) -> bool:
        """Wait until the save under way is whole; return False if that takes more than `seconds`.

        Raises:
            UserError: if it failed; older checkpoints stay.
        """
        if self._thread is not None:
            self._thread.join(min(seconds, threading.TIMEOUT_MAX))
            if self._thread.is_alive():
                return False
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def is_safe(self) -> bool:
        """Whether nothing is under way, or what is has reached the nodes' disks at least."""
        return self._thread is None or self._safe.is_set()

    def forget(self, step: int) -> None:
        """Remove the checkpoints of `step` and after it, from which nobody is to go on."""
        self.wait()
        self._on_first(lambda: manifest.remove_from(self.root, step))

    def newest(self, *, model: str) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest good checkpoint, for `read_state`, and its record.

        Returns None where the run has no checkpoint yet. Damaged ones are named and skipped.

        Raises:
            UserError: if there are checkpoints but none is good, or the newest good one is of
                another model than `model`.
        """
        folder, skipped = self._on_first(lambda: manifest.newest_good(self.root))
        for reason in skipped if self.group.rank() == 0 else ():
            print(f"warning: skipping a damaged checkpoint: {reason}", flush=True)
        if folder is None:
            if skipped:
                raise UserError(
                    f"no checkpoint in {self.root} is whole: {skipped[0]}; restore one, or remove "
                    "the folder to start anew"
                )
            return None
        return folder, check_model(folder, model)

    def _write_guarded(self, begin: float, *args: Any) -> None:
        try:
            self._write(begin, *args)
        except BaseException as error:
            self._error = error

    def _write(
        self,
        begin: float,
        pieces: list[tuple[Piece, memoryview]],
        step: int,
        record: dict[str, Any],
        keep: int | None,
    ) -> None:
        disk, name = self._disk, f"rank_{self.group.rank():05d}.safetensors"
        staged = manifest.staging_folder(self.root, step, self.generation)
        place = staged if disk is None else disk.place(step, self.generation)
        with self._giving_up(step, staged):
            self._on_first(lambda: self._open(staged))
            if disk is not None:
                self._on_all(lambda: place.mkdir(parents=True, exist_ok=True))
            files = self._on_all(lambda: shardfile.write(place / name, pieces))
            whole = Manifest(
                step=step, generation=self.generation, files=tuple(files), record=record
            )
            if disk is not None:
                self._on_all(lambda: disk.keep(whole, place / name))
                self._note_safe(begin)
                self._on_all(lambda: _copy(whole, [place / name], staged))
            self._on_first(lambda: self._commit(whole, keep))
        if disk is None:
            self._note_safe(begin)
        else:
            shutil.rmtree(place, ignore_errors=True)

    def _note_safe(self, begin: float) -> None:
        self.seconds = time.monotonic() - begin
        self._safe.set()

    def _carry_over(self, disk: NodeDisk) -> None:
        """Take on the newest save that an earlier start left on the nodes' disks and no further."""
        found = self._on_all(disk.left)
        best, paths = None, list[Path]()
        newest = self._on_first(self._newest) if any(found) else (0, 0)
        for text in {text for left in found for text in left}:
            whole = manifest.parse(text)
            # What several ranks of a node see is the first one's to copy.
            holder = {p: r for r, left in reversed([*enumerate(found)]) for p in left.get(text, ())}
            complete = {path.name for path in holder} == {file.name for file in whole.files}
            if complete and (whole.generation, whole.step) > newest:
                newest, best = (whole.generation, whole.step), whole
                paths = [path for path, rank in holder.items() if rank == self.group.rank()]
        if best is not None:
            self._publish(best, paths)
        disk.clear()

    def _publish(self, whole: Manifest, paths: list[Path]) -> None:
        """Make a checkpoint of files that all ranks together have, this one those at `paths`."""
        staged = manifest.staging_folder(self.root, whole.step, self.generation)
        with self._giving_up(whole.step, staged):
            self._on_first(lambda: self._open(staged))
            self._on_all(lambda: _copy(whole, paths, staged))
            mine = replace(whole, generation=self.generation)
            self._on_first(lambda: manifest.commit(self.root, mine))

    @contextmanager
    def _giving_up(self, step: int, staged: Path) -> Iterator[None]:
        """Clear away what was staged if it cannot be finished, and say so."""
        try:
            yield
        except (OSError, Fenced) as error:
            self._on_first(lambda: self._give_up(staged))
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.root}: "
                f"{getattr(error, 'strerror', None) or error}; older checkpoints are intact: make "
                "room and start the run again"
            ) from None

    def _newest(self) -> tuple[int, int]:
        """The start and step of the newest good checkpoint; zeros if there is none."""
        folder, _ = manifest.newest_good(self.root)
        found = None if folder is None else manifest.read(folder)
        return (0, 0) if found is None else (found.generation, found.step)

    def _open(self, staged: Path) -> None:
        manifest.check_generation(self.root, self.generation)
        staged.mkdir(parents=True, exist_ok=True)

    def _give_up(self, staged: Path) -> None:
        """Clear the staged files away; a newer start may have done so, which is then the cause."""
        shutil.rmtree(staged, ignore_errors=True)
        manifest.check_generation(self.root, self.generation)

    def _commit(self, whole: Manifest, keep: int | None) -> None:
        newest = manifest.commit(self.root, whole)
        # Later steps are damaged ones that this run was not continued from: they must not count.
        upto = [path for path in manifest.checkpoints(self.root) if path <= newest]
        for old in upto[: -self.keep_last]:
            step = manifest.step_of(old)
            if step != keep and (self.keep_every is None or step % self.keep_every):
                manifest.remove(old)

    def _on_all(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return all results, or raise any rank's OSError."""
        mine, failed = None, None
        try:
            mine = action()
        except OSError as error:
            failed = f"{error.strerror or error} (rank {self.group.rank()})"
        outcomes = gather((mine, failed), self.group)
        for _, reason in outcomes:
            if reason is not None:
                raise OSError(reason)
        return [result for result, _ in outcomes]

    def _on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give every rank its result, or raise its error everywhere."""
        outcome: list[Any] = [None, None]
        if self.group.rank() == 0:
            try:
                outcome[0] = action()
            except (OSError, Fenced) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])


def _copy(whole: Manifest, paths: list[Path], target: Path) -> None:
    """Copy files of a checkpoint and make sure that they are what its manifest says."""
    for path in paths:
        if manifest.copy_durably(path, target / path.name) not in whole.files:
            raise OSError(f"{path} does not match its hash")


def check_model(folder: Path, model: str) -> dict[str, Any]:
    """Return the record of a checkpoint folder.

    Raises:
        UserError: if its `model` is not the one given.
    """
    record = manifest.read(folder).record
    if record["model"] != model:
        raise UserError(f"{folder} is a checkpoint of {record['model']}, not of {model}")
    return record


def read_state(folder: Path, state: State, *, whole: bool = False) -> None:
    """Fill the tensors of `state` in place from a checkpoint folder, whoever wrote it.

    Each process reads what it holds, and asks no other.

    Raises:
        UserError: if the checkpoint lacks one of the tensors or holds it in another shape or
            type, or if `state` is to be the `whole` of it and is not.
    """
    files = [ShardFile(folder / record.name) for record in manifest.read(folder).files]
    pieces: dict[str, list[tuple[ShardFile, Piece]]] = {}
    for file in files:
        for name, piece in file.pieces.items():
            pieces.setdefault(name, []).append((file, piece))
    if whole and (extra := sorted(pieces.keys() - state.keys())):
        raise UserError(
            f"{folder} is a checkpoint of another model: it holds {extra[0]}, the model does not"
        )
    for name, tensor in state.items():
        found = _difference(tensor, pieces[name][0][1]) if name in pieces else "not at all"
        if found is not None:
            raise UserError(
                f"{folder} is a checkpoint of another model: it holds {name} {found}, the model "
                f"has {tuple(tensor.shape)}"
            )
    for name, tensor in state.items():
        _fill(tensor, pieces[name])


def _difference(tensor: Tensor, piece: Piece) -> str | None:
    """Say how what is held of a tensor does not fit it, or return None."""
    if DTYPES[piece.dtype] != tensor.dtype:
        return f"as {piece.dtype} in place of {tensor.dtype}"
    return None if piece.shape == tensor.shape else f"in shape {piece.shape}"


@torch.no_grad()
def _fill(tensor: Tensor, pieces: list[tuple[ShardFile, Piece]]) -> None:
    """Copy what this rank holds of a tensor out of the pieces that have some of it."""
    local, box = held(tensor)
    filled = 0
    for file, piece in pieces:
        part = box.overlap(piece.box)
        if part is None:
            continue
        stored = torch.frombuffer(file.data(piece.name), dtype=tensor.dtype)
        stored = stored.view(piece.box.sizes)[part.within(piece.box)]
        local[part.within(box)].copy_(stored)
        file.forget(piece.name)
        filled += part.num_elements
    # Pieces never overlap, so that counting shows a gap.
    assert filled == box.num_elements, f"{pieces[0][1].name} has gaps"
