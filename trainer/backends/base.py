"""The Backend protocol, and what the backends built on plain PyTorch share.

A backend spreads a model over processes and owns its gradients and its optimizer. Invariant: the
canonical training state it exports does not depend on which backend it is, nor on how many
processes there are: parameter name -> fp32 weight, exp_avg, exp_avg_sq; one step; the buffers.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data.base import Shard
from models.base import STAGES, Backbone
from trainer.config import RunConfig
from trainer.group import gather
from trainer.optim import make_optimizer, make_state, parameter_groups, set_hyper
from trainer.precision import LossScale
from trainer.schedule import Hyper

CanonicalState = dict[str, Tensor]
"""`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` (but not of Muon's matrices), `buffer/NAME`,
`step` and what a LossScale has, each a plain tensor that is equal on all ranks or a DTensor."""

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepInfo:
    """What an optimizer step tells, as tensors on the device: reading them is up to the caller.

    `grad_norm` is the global norm before clipping, `stage_norms` [4] the same of each stage's
    parameters, where the backend knows it; `skipped` is 1.0 where the update was left out.
    """

    grad_norm: Tensor
    skipped: Tensor
    stage_norms: Tensor | None = None

    def to_dict(self) -> dict[str, Tensor]:
        """Return its values by name: grad_norm, skipped, grad_norm_stage1 and so on."""
        named = {"grad_norm": self.grad_norm, "skipped": self.skipped}
        if self.stage_norms is not None:
            named |= {f"grad_norm_stage{s}": self.stage_norms[s - 1] for s in STAGES}
        return named


class Backend(Protocol):
    """What the loop asks of a backend. Coarse on purpose: some own backward, clipping and step."""

    device: torch.device

    @property
    def data_shard(self) -> Shard:
        """The share of every batch that this process works on."""
        ...

    def setup(self, model: Backbone) -> nn.Module:
        """Spread an initialised model on `device`, make the optimizer, return what to call."""
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds a forward and backward pass; `last` says that a step follows it."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss."""
        ...

    def apply(self, hyper: Hyper, keep: Tensor | None = None) -> StepInfo:
        """Clip, step and clear the gradients, without waiting for the device.

        The update is left out where the gradients are not finite, or `keep` is 0.0 on the device.
        """
        ...

    def local_tensors(self) -> dict[str, Tensor]:
        """The live local parts of parameters and floating-point buffers, by name."""
        ...

    def canonical(self, name: str, local: Tensor) -> Tensor:
        """Dress a tensor laid out like the local part of `name` as its share of the whole."""
        ...

    def local_part(self, name: str, tensor: Tensor) -> Tensor:
        """Return of a canonical tensor what is laid out like the local part of `name`."""
        ...

    def refresh(self) -> None:
        """Let the model compute with what was written to local_tensors()."""
        ...

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """The canonical training state, tensor by tensor, so that a save holds few at a time.

        All ranks must take all of it. Tensors may be the live ones: they hold until the next step.
        """
        ...

    def import_state(self, state: CanonicalState) -> None:
        """Take over a state with the names and shapes of export_state()."""
        ...


class TorchBackend(ABC):
    """A backend whose parameters have a local part that a plain optimizer steps.

    Subclasses say how the model is wrapped, what the local part is, and how to add up over ranks.
    """

    def __init__(self, device: torch.device, config: RunConfig) -> None:
        self.device = device
        self.config = config
        self.data_shard = data_shard()
        self.scaling = LossScale(device) if config.train.precision == "fp16" else None

    def setup(self, model: Backbone) -> nn.Module:
        """See Backend.setup."""
        self.model = model
        wrapped = self.wrap(model)
        self.parameters = dict(model.named_parameters())
        self.stage = model.parameter_stages()
        self.locals = {name: self.local(p.detach()) for name, p in self.parameters.items()}
        groups = parameter_groups(model, self.config.optim)
        self.optimizer = make_optimizer(self.locals, groups, self.config.optim, self)
        make_state(self.optimizer, self.locals.values())
        return wrapped

    @abstractmethod
    def wrap(self, model: Backbone) -> nn.Module:
        """Spread the model over the processes and return what to call."""

    @abstractmethod
    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See Backend.micro_batch."""

    def backward(self, loss: Tensor) -> None:
        """See Backend.backward."""
        torch.autograd.backward(loss if self.scaling is None else loss * self.scaling.scale)

    @abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter or gradient that this process holds, sharing its memory."""

    @abstractmethod
    def canonical(self, name: str, local: Tensor) -> Tensor:
        """See Backend.canonical."""

    @abstractmethod
    def sum_over_shards(self, value: Tensor) -> Tensor:
        """Add numbers up over the processes among which parameters are divided."""

    @torch.no_grad()
    def apply(self, hyper: Hyper, keep: Tensor | None = None) -> StepInfo:
        """See Backend.apply."""
        named = self.parameters.items()
        grads = {name: self.local(p.grad) for name, p in named if p.grad is not None}
        if self.scaling is not None:
            torch._foreach_mul_(list(grads.values()), 1 / self.scaling.scale)
        grad_norm, stage_norms = self._norms(grads)
        if (limit := self.config.optim.clip_grad) is not None:
            torch._foreach_mul_(list(grads.values()), (limit / (grad_norm + 1e-6)).clamp(max=1.0))
        skipped = (~grad_norm.isfinite()).float()
        if self.scaling is not None:
            self.scaling.update(skipped)
        if keep is not None:
            skipped = torch.maximum(skipped, 1 - keep)
        for name, parameter in self.parameters.items():
            self.locals[name].grad = grads.get(name)
            parameter.grad = None
        set_hyper(self.optimizer, hyper)
        # The step reads this on the device and then leaves weights and moments alone.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepInfo(grad_norm, skipped, stage_norms)

    def _norms(self, grads: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the norm of all gradients, whose local parts are given, and each stage's, [4]."""
        norms = torch._foreach_norm(list(grads.values()))
        parts = [list(norms)]
        for stage in STAGES:
            named = zip(grads, norms, strict=True)
            parts.append([norm for name, norm in named if self.stage[name] == stage])
        squares = torch.stack([torch.stack(part).square().sum() for part in parts])
        found = self.sum_over_shards(squares).sqrt()
        return found[0], found[1:]

    def local_tensors(self) -> dict[str, Tensor]:
        """See Backend.local_tensors."""
        floating = {name: b for name, b in saved_buffers(self.model) if b.is_floating_point()}
        return {**self.locals, **floating}

    def local_part(self, name: str, tensor: Tensor) -> Tensor:
        """See Backend.local_part."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def refresh(self) -> None:  # noqa: B027
        """See Backend.refresh: the local tensors are what it computes with."""

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """See Backend.export_state."""
        for name, local in self.locals.items():
            yield f"weight/{name}", self.canonical(name, local)
            held = self.optimizer.state[local]
            for moment in (moment for moment in MOMENTS if moment in held):
                yield f"{moment}/{name}", self.canonical(name, held[moment])
        for name, buffer in saved_buffers(self.model):
            yield f"buffer/{name}", buffer
        if self.scaling is not None:
            yield from self.scaling.tensors()
        yield "step", next(iter(self.optimizer.state.values()))["step"].clone()

    @torch.no_grad()
    def import_state(self, state: CanonicalState) -> None:
        """See Backend.import_state."""
        for name, live in self.export_state():
            live.copy_(state[name])
        for held in self.optimizer.state.values():
            held["step"].copy_(state["step"])


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that are part of the training state, by name."""
    kept = model.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def data_shard() -> Shard:
    """Return this rank's share of the data, and which ranks run on its machine beside it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hosts = gather(socket.gethostname())
    first = last = rank
    while first > 0 and hosts[first - 1] == hosts[rank]:
        first -= 1
    while last + 1 < world_size and hosts[last + 1] == hosts[rank]:
        last += 1
    return Shard(rank=rank, world_size=world_size, first_here=first, ranks_here=last + 1 - first)
