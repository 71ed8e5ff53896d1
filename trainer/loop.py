"""Trainer: builds a run in order, then loops.

Owns a run's course: when data are taken, steps made, checkpoints saved, evaluations held. Nothing
here depends on the backend, the model family or the kind of data; there are no callbacks: what the
loop does, it calls by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from data.base import Batch, Cursor, Stopped
from data.ledger import settle
from launcher.process import Process

from .checkpoint import Checkpointer, read_state
from .config import RunConfig
from .control import Control
from .determinism import be_deterministic
from .engine import Engine
from .evaluate import Evaluator
from .group import gather, gloo_group, join
from .guard import BadNumericsError, Guard, Spike
from .inputs import make_stream, open_val, pixels
from .metrics import MetricLogger
from .microbatch import fit_microbatch
from .schedule import Hyper, hyper_at
from .signals import Signals, Stop
from .startup import Startup
from .state import TrainState
from .stragglers import Stragglers
from .task import make_task
from .watchdog import Watchdog


class Trainer:
    """One process of one run."""

    def __init__(self, config: RunConfig, process: Process) -> None:
        self.startup = Startup(os.environ)
        self.startup.reached("imports")
        self.run_dir = Path(config.run_dir)
        config.check_world(process.world_size)
        if config.train.deterministic:
            be_deterministic()
        self.device = join(process, self.run_dir)
        self.startup.reached("group")
        task = make_task(config, self.device)
        self.config = config = fit_microbatch(config, self.device, task)
        self.startup.reached("task")
        self.pipeline = make_stream(config, self.device)
        val = open_val(config, classes=self.pipeline.source.classes)
        self.steps_per_epoch = self.pipeline.steps_per_epoch
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.startup.reached("data")
        self.engine = Engine(config, self.device, task)
        self.startup.reached("model")
        self.checkpointer = Checkpointer(
            self.run_dir / "checkpoints",
            gloo_group(),
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            local_dir=Path(local_dir) if (local_dir := config.checkpoint.local_dir) else None,
        )
        self.control = Control(self.run_dir, generation=self.checkpointer.generation)
        self.guard = Guard(
            config.guard,
            self.run_dir,
            self.device,
            every=config.log.every,
            computes={"precision": config.train.precision, "compile": config.memory.compile},
        )
        self.state = self._restore()
        self.startup.reached("checkpoint")
        self.saved: TrainState | None = self.state
        self.group = gloo_group()
        self.signals = Signals(gloo_group(), self.control)
        self.watchdog = Watchdog(self.control, seconds=config.guard.hang_seconds)
        self.stragglers = Stragglers(self.device, gloo_group())
        self.evaluator = Evaluator(
            config,
            val,
            shard=self.engine.backend.data_shard,
            device=self.device,
            signals=self.signals,
            watchdog=self.watchdog,
        )
        self.metrics = MetricLogger(
            self.control,
            step=self.state.step,
            total_steps=self.total_steps,
            every=config.log.every,
            batch_size=config.train.batch_size,
        )

    def run(self) -> bool:
        """Train until the last step or a request to stop, save, and return whether it is complete.

        Raises:
            Fenced: if a newer start of the run has begun; nothing was written since.
            BadNumericsError: if nothing could be learnt for a whole log interval, or a loss jumped
                where `guard.action` lets nothing be done about it.
            UserError: if the data or the disk gives out; the last good checkpoint stays.
        """
        try:
            return self._train()
        except BaseException as error:
            if self.control.owns_folder():
                self.guard.dump(repr(error), wait=False)
            with suppress(OSError):  # the disk may be what gave out
                self.metrics.close()
            raise
        finally:
            self.watchdog.close()
            self.pipeline.source.close()
            self.evaluator.source.close()

    def _train(self) -> bool:
        self._announce()
        first = self.state.step
        with closing(
            self.pipeline.batches(
                self.state.cursor,
                self.engine.backend.data_shard,
                while_waiting=self.signals.while_waiting,
            )
        ) as stream:
            self._evaluate_if_due()  # a stop may have cut it short
            while self.state.step < self.total_steps and (data := self._take(stream)):
                if self.state.step == first:
                    self.startup.reached("first_batch")
                    self._show_inputs(data[0][0])
                self.advance(data)
                if self.state.step == first + 1:
                    self._started()
                self._look()
                if self.state.cursor.samples == 0:
                    self._check_epoch()
                self._evaluate_if_due()
                if self._due(self.config.checkpoint.every) or self._is_best():
                    self._save(in_background=self.config.checkpoint.async_save)
                if self.signals.save:
                    self._save_as_asked()
        return self._finish()

    def _started(self) -> None:
        """The first step, which may compile and connect, is behind us: be less patient."""
        self.startup.reached("first_step")
        self.metrics.event("startup", self.state.step, **self.startup.seconds())
        self.watchdog.started()
        if (seconds := self.config.guard.hang_seconds) > 0:  # after the watchdog, which says more
            dist.set_timeout(timedelta(seconds=2 * seconds))

    def advance(self, data: Sequence[tuple[Batch, Cursor]]) -> dict[str, Tensor]:
        """Make the next optimizer step with its micro-batches; return its device scalars."""
        self.watchdog.at("computing")
        hyper = self._hyper()
        batches = [batch for batch, _ in data]
        loss = self.engine.accumulate(batches, hyper, self.stragglers)
        verdict = self.guard.judge(loss["loss"])
        info = self.engine.apply(hyper, self.guard.keep(verdict))
        values = {**loss, **verdict, **info.to_dict()}
        begin, (_, after) = self.state.cursor, data[-1]
        self.state = self.state.advance(after)
        self.guard.note(self.state.step, begin, hyper, batches, values)
        self.metrics.train(self.state.step, values, lr=hyper.lr)
        return values

    def _take(self, stream: Iterator[tuple[Batch, Cursor]]) -> list[tuple[Batch, Cursor]]:
        """Return a step's micro-batches, each with the cursor after it; none if we are to stop."""
        self.watchdog.at("waiting for data")
        try:
            with self.metrics.waiting_for_data():
                data = list(islice(stream, self.config.train.accumulate))
        except Stopped:
            return []
        return [] if self.signals.agree() else data

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

    def _look(self) -> None:
        """Look, once an interval, at the numbers of the one before it, and at who is slow."""
        self._check_numerics()
        if self.state.step % self.config.log.every:
            return
        for slow in self.stragglers.look():
            self.metrics.event("straggler", self.state.step, **vars(slow))
        if spikes := self.guard.examine(self.state.step - self.config.log.every):
            for spike in spikes:
                self.metrics.event("spike", spike.step, loss=spike.loss, limit=spike.limit)
            if self.guard.wants_rollback(spikes[0]):
                self._roll_back(spikes[0])

    def _roll_back(self, spike: Spike) -> None:
        """Take the weights back to before a spike; data and schedule go on, past what made it."""
        self.checkpointer.forget(spike.step)
        before = self._restore()
        if before.step == 0:
            raise BadNumericsError(
                f"the loss jumped at step {spike.step}, before there was a checkpoint to go back "
                "to: lower checkpoint.every or optim.lr"
            )
        if (self.state.best_step or 0) >= spike.step:
            self.state = replace(self.state, best=before.best, best_step=before.best_step)
        self.guard.forget()
        self.metrics.event("rollback", self.state.step, spike=spike.step, back_to=before.step)

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
            results = self.evaluator.accuracy(self.engine)
            if results is not None and self.engine.ema is not None:
                with self.engine.averaged():
                    average = self.evaluator.accuracy(self.engine)
                results = average and results | {f"ema_{name}": v for name, v in average.items()}
        if results is not None:
            self.state = self.state.judge(results.get("ema_top1", results["top1"]))
            self.metrics.flush()
            self.metrics.event("eval", self.state.step, **results)

    def _save(self, *, in_background: bool) -> None:
        self.watchdog.at("saving")
        self.metrics.flush()  # a run that goes on from here has reported every step before
        state = replace(self.state, cursor=self._settled_cursor())
        record = {
            "state": state.to_dict(),
            "model": self.config.model.name,
            "backend": self.config.backend.name,
            "guard": self.guard.to_dict(),
        }
        begin = time.perf_counter()
        self.checkpointer.save(self.engine.state(), self.state.step, record, keep=self._kept_best())
        if not in_background:
            self.checkpointer.wait()
        self.saved = self.state
        self.metrics.event("save", self.state.step, stall=time.perf_counter() - begin)

    def _save_as_asked(self) -> None:
        """Make the checkpoint that RUN/save asks for, and wait until it is whole."""
        if self.state != self.saved:
            self._save(in_background=True)
        self.checkpointer.wait()
        self.signals.saved()

    def _save_in_time(self) -> bool:
        """Save what is in no checkpoint yet; return False if too little time is left for that.

        Nothing is lost then: a checkpoint counts only when it is whole.
        """
        if self._is_whole_in_time() and self.state != self.saved:
            left = self._seconds_left()
            if all(gather(self.checkpointer.seconds < left, self.group)):
                self._save(in_background=True)
                self._is_whole_in_time()
        return self.state == self.saved and all(gather(self.checkpointer.is_safe(), self.group))

    def _is_whole_in_time(self) -> bool:
        """Wait for the save under way; return whether all ranks saw its end in time."""
        return all(gather(self.checkpointer.wait(self._seconds_left()), self.group))

    def _seconds_left(self) -> float:
        """The time until the first of all ranks is killed."""
        here = self.signals.seconds_left(self.config.checkpoint.grace)
        return min(map(float, gather(here, self.group)))

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
        newest = self.checkpointer.newest(model=self.config.model.name)
        if newest is None:
            return TrainState(step=0, cursor=self.pipeline.start())
        folder, record = newest
        state = dict(self.engine.state())
        read_state(folder, state, whole=True)
        self.engine.take(state)
        self.guard.take(record["guard"])
        return TrainState.from_dict(record["state"])

    def _announce(self) -> None:
        """Report how this start begins."""
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

    def _show_inputs(self, batch: Batch) -> None:
        """Put the first images of this start on the board, augmented and mixed."""
        if self.config.log.images == 0:
            return
        images, _ = self.engine.mix(batch)
        self.metrics.images(self.state.step, pixels(images[: self.config.log.images], self.config))

    def _finish(self) -> bool:
        """Write what is left: the metrics, and a checkpoint if the state is in none."""
        if self.signals.stop is Stop.STALE:
            raise self.control.fenced()
        if not self._save_in_time():
            self.saved = None
        complete = (
            self.state == self.saved
            and self.state.step >= self.total_steps
            and not self._evaluation_is_due()
        )
        self.metrics.flush()
        self._check_numerics()
        if not complete:
            by_file = self.signals.stop is Stop.FILE
            self.guard.dump(f"stopped by {'RUN/stop' if by_file else 'a signal'}")
        else:  # it may have been asked for while the last checkpoint was on its way
            self.signals.saved()
        self.metrics.event(
            "end" if complete else "stop", self.state.step, best_top1=self.state.best
        )
        self.metrics.close()
        dist.barrier()  # nobody leaves while another still needs its answers
        return complete
