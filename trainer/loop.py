"""Trainer: builds a run in order, then loops.

Nothing here depends on the backend, the model family or the kind of data; there are no callbacks:
what the loop does, it calls by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data.base import Batch, Cursor
from data.ledger import settle
from data.randomness import drop_noise
from launcher.process import Process
from models.layers import micro_batch

from .backends.base import Backend
from .backends.ddp import DDPBackend
from .backends.fsdp import FSDPBackend
from .backends.wrap import build_model, synchronise_batch_norm, wrap_blocks
from .backends.zero import ZeroBackend
from .checkpoint import Checkpointer
from .config import RunConfig
from .determinism import be_deterministic
from .ema import EMA
from .evaluate import Evaluator
from .group import gather, gloo_group, join
from .inputs import make_mixer, make_stream, open_val
from .metrics import MetricLogger
from .microbatch import fit_microbatch
from .precision import autocast
from .schedule import Hyper, hyper_at
from .signals import Signals
from .state import TrainState
from .task import make_task

BACKENDS: dict[str, type[DDPBackend] | type[FSDPBackend] | type[ZeroBackend]] = {
    "ddp": DDPBackend,
    "fsdp": FSDPBackend,
    "zero1": ZeroBackend,
    "zero2": ZeroBackend,
    "zero3": ZeroBackend,
}


class BadNumericsError(RuntimeError):
    """Gradients were not finite for a whole log interval."""


class Trainer:
    """One process of one run."""

    def __init__(self, config: RunConfig, process: Process) -> None:
        self.run_dir = Path(config.run_dir)
        config.check_world(process.world_size)
        if config.train.deterministic:
            be_deterministic()
        self.device = join(process)
        self.task = make_task(config, self.device)
        self.config = config = fit_microbatch(config, self.device, self.task)
        self.pipeline = make_stream(config, self.device)
        val = open_val(config, classes=self.pipeline.source.classes)
        self.mix = make_mixer(config)
        self.steps_per_epoch = self.pipeline.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.bare_model = build_model(config.model, seed=config.train.seed, device=self.device)
        for _, side in config.train.image_sides():  # a size that does not fit is an error now
            self._fit(side)
        wrap_blocks(self.bare_model, config.memory)
        synchronise_batch_norm(self.bare_model)
        self.backend: Backend = BACKENDS[config.backend.name](self.device, config)
        self.model = self.backend.setup(self.bare_model)
        averaged = config.train.ema_decay > 0
        self.ema = EMA(self.backend.local_tensors()) if averaged else None
        self.checkpointer = Checkpointer(
            self.run_dir / "checkpoints",
            gloo_group(),
            keep_last=config.checkpoint.keep_last,
        )
        self.state = self.saved = self._restore()
        self.group = gloo_group()
        self.signals = Signals(gloo_group())
        self.evaluator = Evaluator(
            config,
            val,
            shard=self.backend.data_shard,
            device=self.device,
            stop=self.signals.agree,
        )
        self.metrics = MetricLogger(
            self.run_dir,
            step=self.state.step,
            total_steps=self.total_steps,
            every=config.log.every,
            batch_size=config.train.batch_size,
        )

    def run(self) -> bool:
        """Train until the last step or a signal, save, and return whether the run is complete.

        Raises:
            BadNumericsError: if nothing could be learnt for a whole log interval.
            UserError: if the data or the disk gives out; the last good checkpoint stays.
        """
        try:
            return self._train()
        except BaseException:
            with suppress(OSError):  # the disk may be what gave out
                self.metrics.close()
            raise
        finally:
            self.pipeline.source.close()
            self.evaluator.source.close()

    def _train(self) -> bool:
        self._announce()
        shard = self.backend.data_shard
        with closing(self.pipeline.batches(self.state.cursor, shard)) as stream:
            self._evaluate_if_due()  # a stop may have cut it short
            while self.state.step < self.total_steps and not self.signals.agree():
                hyper = self._hyper()
                values, cursor = self._step(stream, hyper)
                self.state = self.state.advance(cursor)
                self.metrics.train(self.state.step, values, lr=hyper.lr)
                self._check_numerics()
                if cursor.samples == 0:
                    self._check_epoch()
                self._evaluate_if_due()
                if self._due(self.config.checkpoint.every) or self._is_best():
                    self._save()
        return self._finish()

    def _step(
        self, stream: Iterator[tuple[Batch, Cursor]], hyper: Hyper
    ) -> tuple[dict[str, Tensor], Cursor]:
        """Make one optimizer step; return its device scalars and the cursor after its data."""
        accumulate = self.config.train.accumulate
        self.bare_model.drop_share = hyper.drop_path
        values: dict[str, Tensor] = {}
        for micro in range(accumulate):
            with self.metrics.waiting_for_data():
                batch, cursor = next(stream)
            self._fit(batch.images.shape[1])
            last = micro == accumulate - 1
            with micro_batch(micro, count=accumulate), self.backend.micro_batch(last=last):
                with self._autocast():
                    images, targets = self.mix(batch)
                    loss = self.task(self.model, images, targets, self._drop_noise(batch))
                share = batch.weight / accumulate
                self.backend.backward(loss.total * share)
            for name, part in loss.parts.items():
                values[name] = values.get(name, torch.zeros_like(part)) + part * share
        info = self.backend.apply(hyper)
        if self.ema is not None:
            self.ema.update(hyper.ema_decay)
        return {**values, "grad_norm": info.grad_norm, "skipped": info.skipped}, cursor

    def _fit(self, side: int) -> None:
        """Set the model for square images of `side` pixels."""
        if self.bare_model.size != (side, side):
            self.bare_model.reset_buffers((side, side))

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.config.train.precision)

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

    def _hyper(self) -> Hyper:
        """What the schedules say of the next step."""
        return hyper_at(
            self.state.step,
            self.config,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )

    def _due(self, every: int) -> bool:
        step = self.state.step
        return step % max(every, 1) == 0 or step == self.total_steps

    def _evaluation_is_due(self) -> bool:
        every = round(self.config.eval.every_epochs * self.steps_per_epoch)
        return self._due(every) and self.state.evaluated_step != self.state.step

    def _is_best(self) -> bool:
        return self.config.checkpoint.keep_best and self.state.best_step == self.state.step

    def _check_numerics(self) -> None:
        if self.metrics.nothing_learnt_at is not None:
            raise BadNumericsError(
                "gradients were not finite for a whole log interval up to step "
                f"{self.metrics.nothing_learnt_at}: lower optim.lr, set optim.clip_grad, or use "
                "train.precision fp32"
            )

    def _evaluate_if_due(self) -> None:
        """Evaluate live and averaged weights; a signal to stop cuts it short."""
        if not self._evaluation_is_due():
            return
        with self.metrics.paused():
            results = self._accuracy()
            if results is not None and self.ema is not None:
                with self._averaged():
                    average = self._accuracy()
                results = average and results | {f"ema_{name}": v for name, v in average.items()}
        if results is not None:
            self.state = self.state.judge(results.get("ema_top1", results["top1"]))
            self.metrics.flush()
            self.metrics.event("eval", self.state.step, **results)

    def _accuracy(self) -> dict[str, float] | None:
        self._fit(self.config.model.img_size)
        with self._autocast():
            return self.evaluator.accuracy(self.model)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Let the model compute with the average for as long as the context lasts."""
        assert self.ema is not None
        with self.ema.swapped():
            self.backend.refresh()
            yield
        self.backend.refresh()

    def _full_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the training state, by canonical name."""
        yield from self.backend.export_state()
        if self.ema is not None:
            for name, tensor in self.ema.average.items():
                yield f"ema/{name}", self.backend.canonical(name, tensor)

    def _save(self) -> None:
        self.metrics.flush()  # a run that goes on from here has reported every step before
        state = replace(self.state, cursor=self._settled_cursor())
        record = {"state": state.to_dict(), "model": self.config.model.name}
        self.checkpointer.save(self._full_state(), self.state.step, record, keep=self._kept_best())
        self.saved = self.state
        if not self.config.checkpoint.async_save:
            self.checkpointer.wait()

    def _settled_cursor(self) -> Cursor:
        """Return what all ranks together have to say of the data so far.

        Raises:
            DataError: if more images had to be replaced than may be.
        """
        cursor = self.state.cursor
        settled = settle([Cursor.from_dict(c) for c in gather(cursor.to_dict(), self.group)])
        self.pipeline.check_replaced(settled.quarantine)
        return settled

    def _check_epoch(self) -> None:
        """Prove that the epoch that ended showed each image once."""
        cursor = self._settled_cursor()
        self.pipeline.check_epoch(cursor)
        if cursor.audit.count + cursor.replaced.count == 0:
            return  # a loader that keeps no account
        self.metrics.event(
            "audit",
            self.state.step,
            epoch=cursor.epoch - 1,
            shown=cursor.audit.count,
            replaced=cursor.replaced.count,
            quarantined=len(cursor.quarantine),
        )

    def _kept_best(self) -> int | None:
        return self.state.best_step if self.config.checkpoint.keep_best else None

    def _restore(self) -> TrainState:
        """Continue from the newest good checkpoint, or start."""
        state = dict(self._full_state())
        record = self.checkpointer.load(state, model=self.config.model.name)
        if record is None:
            return TrainState(step=0, cursor=self.pipeline.start())
        self.backend.import_state(state)
        if self.ema is not None:
            for name, tensor in self.ema.average.items():
                tensor.copy_(self.backend.local_part(name, state[f"ema/{name}"]))
        return TrainState.from_dict(record["state"])

    def _announce(self) -> None:
        """Report how this start begins, and what the network is about to see."""
        self.metrics.config(self.config.to_json())
        self.metrics.event(
            "start",
            self.state.step,
            steps=self.total_steps,
            world_size=dist.get_world_size(),
            backend=self.config.backend.name,
            accumulate=self.config.train.accumulate,
            generation=self.checkpointer.generation,
        )
        if self.config.log.images > 0 and self.state.step < self.total_steps:
            self._show_inputs()

    def _show_inputs(self) -> None:
        """Put the first augmented and mixed images of this start on the board."""
        with closing(self.pipeline.batches(self.state.cursor, self.backend.data_shard)) as stream:
            images, _ = self.mix(next(stream)[0])
        shown = images[: self.config.log.images].permute(0, 2, 3, 1).float().cpu()
        mean, std = torch.tensor(self.config.data.mean), torch.tensor(self.config.data.std)
        self.metrics.images(
            self.state.step, ((shown * std + mean) * 255).round().clamp(0, 255).byte()
        )

    def _finish(self) -> bool:
        """Write what is left: the metrics, and a checkpoint if the state is in none."""
        self.signals.settle()
        complete = self.state.step >= self.total_steps and not self._evaluation_is_due()
        if self.state != self.saved:
            self._save()
        self.checkpointer.wait()
        self.metrics.flush()
        self._check_numerics()
        self.metrics.event(
            "end" if complete else "stop", self.state.step, best_top1=self.state.best
        )
        self.metrics.close()
        dist.barrier()  # nobody leaves while another still needs its answers
        return complete
