"""Checkpointer: the canonical training state on disk, sharded, whole or not at all.

Tensors travel through torch.distributed.checkpoint in its safetensors form, one file per rank with
the place of every shard in its header: it reshards to any world size on load, and nothing in it is
ever unpickled. When a folder counts as a checkpoint is `trainer.manifest`'s subject.
"""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as distributed_load
from torch.distributed.checkpoint.state_dict_saver import save as distributed_save

from . import manifest
from .config import UserError
from .manifest import Fenced, FileRecord, Manifest

T = TypeVar("T")

State = dict[str, Tensor]
"""Canonical training state: a name such as `weight/head.bias` -> fp32 tensor or DTensor."""


class Checkpointer:
    """Saves and loads the checkpoints of one run folder; used by all ranks alike.

    One save is under way at most. `group` is a gloo group over all ranks that nothing else uses,
    since a save in the background talks over it while training goes on.
    """

    def __init__(self, root: Path, group: dist.ProcessGroup, *, keep_last: int) -> None:
        self.root = root
        self.group = group
        self.keep_last = keep_last
        try:
            self.generation = self._on_first(lambda: manifest.begin_generation(root))
        except OSError as error:
            raise UserError(f"cannot write to {root}: {error.strerror}") from None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        state: Iterable[tuple[str, Tensor]],
        step: int,
        record: dict[str, Any],
        *,
        keep: int | None,
    ) -> None:
        """Copy `state` and write it in the background as the checkpoint of `step`.

        Waits for an earlier save first. `record` is the JSON that load() returns, its `model` the
        network's name; `keep` names a step whose checkpoint retention must spare.

        Raises:
            UserError: if the earlier save failed, a full disk for one; older checkpoints stay.
        """
        self.wait()
        copy = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state}
        self._thread = threading.Thread(
            target=self._write_guarded, args=(copy, step, record, keep), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save under way is whole, and raise UserError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, Fenced):
            raise UserError(str(error))
        if error is not None:
            raise error

    def forget(self, step: int) -> None:
        """Remove the checkpoints of `step` and after it, from which nobody is to go on."""
        self.wait()
        self._on_first(lambda: manifest.remove_from(self.root, step))

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
        read_state(folder, state, group=self.group, whole=True)
        return record

    def _write_guarded(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:
            self._error = error

    def _write(self, state: State, step: int, record: dict[str, Any], keep: int | None) -> None:
        staged = manifest.staging_folder(self.root, step, self.generation)
        try:
            self._on_first(lambda: self._open(staged))
            distributed_save(
                state,
                storage_writer=HuggingFaceStorageWriter(str(staged), save_distributed=True),
                process_group=self.group,
            )
            files = self._describe_all(staged)
            self._on_first(lambda: self._commit(step, record, files, keep))
        except (CheckpointException, OSError, Fenced) as error:
            self._on_first(lambda: self._give_up(staged))
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.root}: "
                f"{_reason(error)}; older checkpoints are intact: make room and start the run again"
            ) from None

    def _open(self, staged: Path) -> None:
        manifest.check_generation(self.root, self.generation)
        staged.mkdir(parents=True, exist_ok=True)

    def _give_up(self, staged: Path) -> None:
        """Clear the staged files away; a newer start may have done so, which is then the cause."""
        shutil.rmtree(staged, ignore_errors=True)
        manifest.check_generation(self.root, self.generation)

    def _describe_all(self, staged: Path) -> list[FileRecord]:
        """Hash this rank's file and return every rank's records, or raise any rank's OSError."""
        mine: list[FileRecord] | OSError
        try:
            files = sorted(staged.glob(f"shard-{self.group.rank() + 1:05d}-*"))
            mine = [manifest.describe(path) for path in files]
        except OSError as error:
            mine = error
        gathered: list[Any] = [None] * self.group.size()
        dist.all_gather_object(gathered, mine, self.group)
        for answer in gathered:
            if isinstance(answer, OSError):
                raise answer
        return [record for records in gathered for record in records]

    def _commit(
        self, step: int, record: dict[str, Any], files: list[FileRecord], keep: int | None
    ) -> None:
        newest = manifest.commit(
            self.root,
            Manifest(step=step, generation=self.generation, files=tuple(files), record=record),
        )
        spared = {manifest.step_folder(self.root, keep)} if keep is not None else set()
        # Later steps are damaged ones that this run was not continued from: they must not count.
        upto = [path for path in manifest.checkpoints(self.root) if path <= newest]
        for old in upto[: -self.keep_last]:
            if old not in spared:
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


def read_state(
    folder: Path, state: State, *, group: dist.ProcessGroup | None = None, whole: bool = False
) -> None:
    """Fill the tensors of `state` in place from a checkpoint folder.

    Without a group it works in a single process, whatever world size wrote the checkpoint.

    Raises:
        UserError: if the checkpoint lacks one of the tensors or holds it in another shape, or if
            `state` is to be the `whole` of it and is not.
    """
    reader = HuggingFaceStorageReader(str(folder))
    held = reader.read_metadata().state_dict_metadata
    extra = sorted(held.keys() - state.keys()) if whole else []
    if extra:
        raise UserError(
            f"{folder} is a checkpoint of another model: it holds {extra[0]}, the model does not"
        )
    for name, tensor in state.items():
        shape = tuple(getattr(held.get(name), "size", ()))
        if name not in held or shape != tuple(tensor.shape):
            found = f"in shape {shape}" if name in held else "not at all"
            raise UserError(
                f"{folder} is a checkpoint of another model: it holds {name} {found}, the model "
                f"has {tuple(tensor.shape)}"
            )
    with warnings.catch_warnings():
        # That it reads in a single process here is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        distributed_load(state, storage_reader=reader, process_group=group, no_dist=group is None)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"{_reason(cause)} (rank {rank})"
    return getattr(error, "strerror", None) or str(error)
