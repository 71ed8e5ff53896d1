"""The loop of a dense fine-tuning run: what detection and segmentation do alike.

A run is its folder, as in pretraining: config.json, metrics.jsonl, tensorboard/, checkpoints/,
logs/, and `stop` and `save` to ask for. accelerate brings mixed precision and DDP; order, seeds
and checkpoints are ours, so that a run that was interrupted goes on exactly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch import Tensor, nn

from data.randomness import Purpose
from launcher.process import Process
from trainer.backends.wrap import synchronise_batch_norm
from trainer.checkpoint import Checkpointer, read_state
from trainer.control import Control
from trainer.group import gloo_group, join
from trainer.guard import BadNumericsError
from trainer.metrics import MetricLogger
from trainer.signals import Signals, Stop

from .feed import Positions, Samples, batches, seed_of
from .optim import learning_rate, make_optimizer, set_lr
from .settings import DenseSettings

WEIGHTS = "model.safetensors"
"""The weights that a finished run leaves in its folder, under the names of its model."""


class Task(Protocol):
    """What a run is about: a network, its pictures, and how good it is."""

    name: str
    """Says what a checkpoint is of, such as `dino on transnext_tiny, 80 classes`."""
    model: nn.Module
    """In training it returns named losses; their sum is what is minimised."""

    @property
    def samples(self) -> Samples:
        """The training samples."""
        ...

    def collate(self, views: list[Any]) -> Any:
        """Return one micro-batch: the arguments of the model."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the scores on the validation pictures in percent; all ranks call it together."""
        ...

    def draw(self, model: nn.Module) -> list[Tensor]:
        """Return validation pictures uint8 [H, W, 3] with truth and predictions drawn on them."""
        ...


class FineTuning:
    """One process of one dense fine-tuning run."""

    def __init__(self, task: Task, settings: DenseSettings, process: Process) -> None:
        self.task = task
        self.settings = settings
        self.folder = Path(settings.out)
        train = settings.train
        self.share = settings.share(process.world_size)
        self.device = join_for_accelerate(process, self.folder)
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(train.precision, train.precision),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        model = task.model.to(self.device)
        synchronise_batch_norm(model)
        if self.device.type == "cuda" and process.world_size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.bare = model
        optimizer = make_optimizer(model, settings.optim)
        self.optimizer = optimizer
        self.model, self.stepper = self.accelerator.prepare(model, optimizer)
        self.total_steps = train.steps or -(-train.epochs * len(task.samples) // train.batch_size)
        self.eval_every = train.eval_every or self._usual_evaluations()
        self.checkpointer = Checkpointer(self.folder / "checkpoints", gloo_group(), keep_last=2)
        self.control = Control(self.folder, generation=self.checkpointer.generation)
        self.step = self._restore()
        self.saved = self.step
        self.signals = Signals(gloo_group(), self.control)
        self.metrics = MetricLogger(
            self.control,
            step=self.step,
            total_steps=self.total_steps,
            every=train.log_every,
            batch_size=train.batch_size,
        )

    def run(self) -> bool:
        """Train to the last step, or until asked to stop; return whether it is complete.

        Raises:
            UserError, DataError: if pictures, labels or the disk give out; the last checkpoint
                stays.
            BadNumericsError: if no update could be made for a whole log interval.
            Fenced: if a newer start of the run has begun.
        """
        self.metrics.event(
            "start",
            self.step,
            steps=self.total_steps,
            world_size=dist.get_world_size(),
            generation=self.checkpointer.generation,
        )
        self.model.train()
        stream = self._stream()
        while self.step < self.total_steps:
            with self.metrics.waiting_for_data():
                micro_batches = list(islice(stream, self.settings.train.accumulate))
            if self.signals.agree():
                break
            self._advance(micro_batches)
            self._check_numerics()
            if self._due(self.eval_every):
                self._evaluate()
            if self._due(self.settings.train.save_every) or self.signals.save:
                self._save()
        return self._finish()

    def _stream(self) -> Iterator[Any]:
        train = self.settings.train
        positions = Positions(
            len(self.task.samples),
            seed=train.seed,
            share=self.share,
            accumulate=train.accumulate,
            start=self.step,
            stop=self.total_steps,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        return batches(
            self.task.samples,
            positions,
            self.task.collate,
            seed=train.seed,
            num_workers=train.num_workers,
        )

    def _advance(self, micro_batches: list[Any]) -> None:
        """Make the next optimizer step, unless its gradients are not finite."""
        optim = self.settings.optim
        lr = learning_rate(self.step, optim, total_steps=self.total_steps)
        set_lr(self.optimizer, lr)
        # What a step draws, drop path and noisy queries, is a function of the step and the rank.
        torch.manual_seed(
            seed_of(self.settings.train.seed, self.step, dist.get_rank(), Purpose.STEP)
        )
        values = self._accumulate(micro_batches)
        limit = float("inf") if optim.clip_grad is None else optim.clip_grad
        norm = self.accelerator.clip_grad_norm_(self.bare.parameters(), limit)
        assert norm is not None, "only DeepSpeed keeps the norm to itself"
        skipped = not bool(norm.isfinite())
        if not skipped or self.accelerator.scaler is not None:  # which leaves such steps out itself
            self.stepper.step()
        self.stepper.zero_grad()
        self.step += 1
        values |= {"grad_norm": norm, "skipped": torch.tensor(float(skipped), device=norm.device)}
        self.metrics.train(self.step, values, lr=lr)

    def _accumulate(self, micro_batches: list[Any]) -> dict[str, Tensor]:
        """Add up the gradients of a step; return its mean losses."""
        values: dict[str, Tensor] = {}
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = self.model(*to_device(batch, self.device))
                total = torch.stack([loss.float() for loss in losses.values()]).sum()
                self.accelerator.backward(total / len(micro_batches))
            for name, value in {"loss": total, **losses}.items():
                found = value.detach().float() / len(micro_batches)
                values[name] = values[name] + found if name in values else found
        return values

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total_steps

    def _usual_evaluations(self) -> int:
        train = self.settings.train
        per_epoch = len(self.task.samples) // train.batch_size
        return max(1, per_epoch if train.epochs else self.total_steps // 10)

    def _evaluate(self) -> None:
        self.metrics.flush()
        with self.metrics.paused(), torch.no_grad():
            self.bare.eval()
            begin = time.perf_counter()
            scores = self.task.evaluate(self.bare)
            seconds = time.perf_counter() - begin
            if dist.get_rank() == 0:
                for index, picture in enumerate(self.task.draw(self.bare)):
                    self.metrics.images(self.step, picture[None], name=f"predictions/{index}")
            self.bare.train()
        self.metrics.event("eval", self.step, **scores, seconds=seconds)

    def _check_numerics(self) -> None:
        if self.metrics.nothing_learnt_at is not None:
            raise BadNumericsError(
                "gradients were not finite for a whole log interval up to step "
                f"{self.metrics.nothing_learnt_at}: lower optim.lr, set optim.clip_grad, or use "
                "train.precision fp32"
            )

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that the next step depends on, by name; the tensors are the live ones."""
        for name, tensor in self.bare.state_dict().items():
            yield f"weight/{name}", tensor
        for name, parameter in self.bare.named_parameters():
            if parameter.requires_grad:
                moments = self.optimizer.state[parameter]
                if not moments:
                    moments["step"] = torch.zeros(())
                    moments["exp_avg"] = torch.zeros_like(parameter)
                    moments["exp_avg_sq"] = torch.zeros_like(parameter)
                for kind, tensor in moments.items():
                    yield f"{kind}/{name}", tensor

    def _save(self) -> None:
        self.metrics.flush()
        scaler = self.accelerator.scaler
        record = {
            "model": self.task.name,
            "step": self.step,
            "loss_scale": None if scaler is None else scaler.state_dict(),
        }
        self.checkpointer.save(self._state(), self.step, record, keep=None)
        self.checkpointer.wait()
        self.saved = self.step
        if self.signals.save:
            self.signals.saved()

    def _restore(self) -> int:
        """Take the newest good checkpoint's state; return its step, 0 without one."""
        newest = self.checkpointer.newest(model=self.task.name)
        if newest is None:
            return 0
        folder, record = newest
        read_state(folder, dict(self._state()), whole=True)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(record["loss_scale"])
        return int(record["step"])

    def _finish(self) -> bool:
        """Save what is in no checkpoint yet and, at the end, the weights alone."""
        if self.signals.stop is Stop.STALE:
            raise self.control.fenced()
        if self.saved != self.step:
            self._save()
        complete = self.step == self.total_steps
        if complete and dist.get_rank() == 0:
            weights = {k: v.contiguous() for k, v in self.bare.state_dict().items()}
            part = self.folder / f"{WEIGHTS}.part"
            save_file(weights, part)
            part.replace(self.folder / WEIGHTS)
        self.metrics.flush()
        self._check_numerics()
        self.metrics.event("end" if complete else "stop", self.step)
        self.metrics.close()
        dist.barrier()  # nobody leaves while another still needs its answers
        return complete


def join_for_accelerate(process: Process, folder: Path) -> torch.device:
    """Join the run's processes and tell accelerate, which reads torchrun's variables, of it."""
    device = join(process, folder)
    if process.world_size > 1:
        os.environ |= {
            "RANK": str(process.rank),
            "WORLD_SIZE": str(process.world_size),
            "LOCAL_RANK": str(process.local_rank),
            "MASTER_ADDR": process.address,
            "MASTER_PORT": str(process.port),
        }
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    return device


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch, a structure of tuples, lists and dicts, with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
