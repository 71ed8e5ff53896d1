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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import manifest, shardfile
from .config import UserError
from .group import gather
from .manifest import Fenced, FileRecord, Manifest
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
    ) -> None:
        self.root = root
        self.group = group
        self.keep_last = keep_last
        self.keep_every = keep_every
        try:
            self.generation = self._on_first(lambda: manifest.begin_generation(root))
        except OSError as error:
            raise UserError(f"cannot write to {root}: {error.strerror}") from None
        self._copy = HostCopy(rank=group.rank(), world_size=group.size())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0
        """What the last save took until it was whole; 0 before the first."""

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
        pieces = self._copy.take(state)
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
        if isinstance(error, Fenced):
            raise UserError(str(error))
        if error is not None:
            raise error
        return True

    def load(self, state: State, *, model: str) -> dict[str, Any] | None:
        """Fill `state` in place from the newest good checkpoint; return its record.

        Returns None where the run has no checkpoint yet. Damaged ones are named and skipped.

        Raises:
            UserError: if there are checkpoints but none is good, or the newest good one is of
                another model than `model`, or holds other tensors than `state`.
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
        record = check_model(folder, model)
        read_state(folder, state, whole=True)
        return record

    def _write_guarded(self, begin: float, *args: Any) -> None:
        try:
            self._write(*args)
            self.seconds = time.monotonic() - begin
        except BaseException as error:
            self._error = error

    def _write(
        self,
        pieces: list[tuple[Piece, memoryview]],
        step: int,
        record: dict[str, Any],
        keep: int | None,
    ) -> None:
        staged = manifest.staging_folder(self.root, step, self.generation)
        try:
            self._on_first(lambda: self._open(staged))
            files = self._write_all(staged, pieces)
            self._on_first(lambda: self._commit(step, record, files, keep))
        except (OSError, Fenced) as error:
            self._on_first(lambda: self._give_up(staged))
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.root}: "
                f"{getattr(error, 'strerror', None) or error}; older checkpoints are intact: make "
                "room and start the run again"
            ) from None

    def _open(self, staged: Path) -> None:
        manifest.check_generation(self.root, self.generation)
        staged.mkdir(parents=True, exist_ok=True)

    def _give_up(self, staged: Path) -> None:
        """Clear the staged files away; a newer start may have done so, which is then the cause."""
        shutil.rmtree(staged, ignore_errors=True)
        manifest.check_generation(self.root, self.generation)

    def _write_all(self, staged: Path, pieces: list[tuple[Piece, memoryview]]) -> list[FileRecord]:
        """Write this rank's file and return every rank's record, or raise any rank's OSError."""
        mine: FileRecord | str
        try:
            mine = shardfile.write(staged / f"rank_{self.group.rank():05d}.safetensors", pieces)
        except OSError as error:
            mine = f"{error.strerror} (rank {self.group.rank()})"
        records = gather(mine, self.group)
        for record in records:
            if isinstance(record, str):
                raise OSError(record)
        return records

    def _commit(
        self, step: int, record: dict[str, Any], files: list[FileRecord], keep: int | None
    ) -> None:
        newest = manifest.commit(
            self.root,
            Manifest(step=step, generation=self.generation, files=tuple(files), record=record),
        )
        # Later steps are damaged ones that this run was not continued from: they must not count.
        upto = [path for path in manifest.checkpoints(self.root) if path <= newest]
        for old in upto[: -self.keep_last]:
            step = manifest.step_of(old)
            if step != keep and (self.keep_every is None or step % self.keep_every):
                manifest.remove(old)

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
        filled += part.num_elements
    # Pieces never overlap, so that counting shows a gap.
    assert filled == box.num_elements, f"{pieces[0][1].name} has gaps"
