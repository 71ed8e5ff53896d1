"""Engine: the network in training, spread over processes, and what makes an optimizer step.

Owns the tensors of a run: weights, optimizer state, buffers and their moving average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from data.base import Batch
from data.randomness import drop_noise
from models.layers import micro_batch

from . import manifest
from .backends.base import Backend, CanonicalState, StepInfo
from .backends.ddp import DDPBackend
from .backends.fsdp import FSDPBackend
from .backends.wrap import build_model, synchronise_batch_norm, wrap_blocks
from .backends.zero import ZeroBackend
from .config import RunConfig
from .ema import EMA
from .inputs import make_mixer
from .precision import autocast
from .pretrained import begin_from
from .schedule import Hyper
from .stragglers import Stragglers
from .task import Task

BACKENDS: dict[str, type[DDPBackend] | type[FSDPBackend] | type[ZeroBackend]] = {
    "ddp": DDPBackend,
    "fsdp": FSDPBackend,
    "zero1": ZeroBackend,
    "zero2": ZeroBackend,
    "zero3": ZeroBackend,
}


class Engine:
    """The network of `config` on `device`, trained for `task`.

    `bare_model` is the network itself, `model` what is called in its place. Raises ModelError where
    an image side of the run does not fit it, and UserError where it cannot begin from the weights
    that `config.train.init_from` names.
    """

    def __init__(self, config: RunConfig, device: torch.device, task: Task) -> None:
        self.config = config
        self.device = device
        self.task = task
        self.mix = make_mixer(config)
        self.bare_model = build_model(config.model, seed=config.train.seed, device=self.device)
        begun = bool(manifest.checkpoints(Path(config.run_dir) / "checkpoints"))
        if config.train.init_from is not None and not begun:
            begin_from(config.train.init_from, self.bare_model)
        for _, side in config.train.image_sides():  # a size that does not fit is an error now
            self.fit(side)
        wrap_blocks(self.bare_model, config.memory)
        synchronise_batch_norm(self.bare_model)
        self.backend: Backend = BACKENDS[config.backend.name](self.device, config)
        self.model = self.backend.setup(self.bare_model)
        averaged = config.train.ema_decay > 0
        self.ema = EMA(self.backend.local_tensors()) if averaged else None

    def accumulate(
        self, batches: Sequence[Batch], hyper: Hyper, stragglers: Stragglers
    ) -> dict[str, Tensor]:
        """Add up the gradients of a step's micro-batches; return its losses, device scalars.

        They are this rank's part of a mean over ranks.
        """
        count = len(batches)
        self.bare_model.drop_share = hyper.drop_path
        values: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            self.fit(batch.images.shape[1])
            with micro_batch(micro, count=count), self.backend.micro_batch(last=micro == count - 1):
                with self.autocast(), stragglers.timing():
                    images, targets = self.mix(batch)
                    loss = self.task(self.model, images, targets, self._drop_noise(batch))
                share = batch.weight / count
                self.backend.backward(loss.total * share)
            for name, part in loss.parts.items():
                values[name] = values.get(name, torch.zeros_like(part)) + part * share
        return values

    def apply(self, hyper: Hyper, keep: Tensor | None) -> StepInfo:
        """Make the optimizer step; see Backend.apply."""
        info = self.backend.apply(hyper, keep)
        if self.ema is not None:
            self.ema.update(hyper.ema_decay)
        return info

    def fit(self, side: int) -> None:
        """Set the model for square images of `side` pixels."""
        if self.bare_model.size != (side, side):
            self.bare_model.reset_buffers((side, side))

    def autocast(self) -> torch.autocast:
        """The context of forward passes, in the run's precision."""
        return autocast(self.device, self.config.train.precision)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model compute with the average for as long as the context lasts."""
        assert self.ema is not None
        with self.ema.swapped():
            self.backend.refresh()
            yield
        self.backend.refresh()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the training state, by canonical name; see Backend.export_state."""
        yield from self.backend.export_state()
        if self.ema is not None:
            for name, tensor in self.ema.average.items():
                yield f"ema/{name}", self.backend.canonical(name, tensor)

    def take(self, state: CanonicalState) -> None:
        """Take over what state() yielded."""
        self.backend.import_state(state)
        if self.ema is not None:
            for name, tensor in self.ema.average.items():
                tensor.copy_(self.backend.local_part(name, state[f"ema/{name}"]))

    def _drop_noise(self, batch: Batch) -> Tensor | None:
        """The micro-batch's drop-path noise, keyed by each image's place in the epoch."""
        if self.config.model.drop_path == 0:
            return None
        noise = drop_noise(
            self.config.train.seed,
            batch.epoch,
            batch.positions.numpy(),
            num_blocks=self.bare_model.num_blocks,
        )
        return torch.from_numpy(noise).to(self.device, non_blocking=True)
