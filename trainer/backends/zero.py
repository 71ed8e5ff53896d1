"""DeepSpeed's ZeRO (https://arxiv.org/abs/1910.02054): stages 1 to 3, offload to CPU and disk.

Stage 1 divides the optimizer's state over the processes, stage 2 the gradients too, stage 3 the
weights too. DeepSpeed flattens parameters one after the other and cuts where the ranks' equal
parts end, so a rank holds a range of some parameters and nothing of others.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from models.base import Backbone
from trainer.config import RunConfig, UserError
from trainer.optim import adamw, make_state, parameter_groups, set_hyper
from trainer.precision import LossScale
from trainer.schedule import Hyper
from trainer.shares import whole
from trainer.zero_config import zero_config

from .base import MOMENTS, CanonicalState, StepInfo, data_shard, saved_buffers


@dataclass(frozen=True)
class Share:
    """This rank's part of a parameter: its elements `start` and on, `length` of them.

    They are the elements `offset` and on of the flat weights of `group`, and of their moments.
    """

    start: int
    length: int
    group: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The part of a tensor laid out like the group's flat weights, sharing its memory."""
        return flat.detach().narrow(0, self.offset, self.length)


class ZeroBackend:
    """Lets DeepSpeed divide the training state, step by our AdamW over its flat parts."""

    def __init__(self, device: torch.device, config: RunConfig) -> None:
        self.device = device
        self.config = config
        self.data_shard = data_shard()
        self.on_disk = config.backend.offload_dir is not None
        # On the CPU, where DeepSpeed decides about every step.
        scaled = config.train.precision == "fp16"
        self.scaling = LossScale(torch.device("cpu")) if scaled else None

    def setup(self, model: Backbone) -> nn.Module:
        """See Backend.setup.

        Raises:
            UserError: if DeepSpeed is not installed, or backend.offload_dir cannot be used.
        """
        deepspeed = _deepspeed(self.device)
        settings = zero_config(self.config)
        if self.on_disk:
            _check_disk(Path(settings["zero_optimization"]["offload_optimizer"]["nvme_path"]))
        self.model = model
        self.mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        parameters = dict(model.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        stage = self.config.backend.zero_stage
        if stage == 3:
            for block in model.blocks():
                if block.residual:  # gathered whole: its parts use one another's weights
                    deepspeed.utils.set_z3_leaf_module(block.module, True)
        groups = parameter_groups(model, self.config.optim)
        self.optimizer = adamw(parameters, groups, self.config.optim)
        self.engine: Any = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings
        )[0]
        zero = self.engine.optimizer
        zero.torch_autocast_gradscaler = None  # a scale that no checkpoint would know
        self._follow_scale()
        if self.on_disk:
            _keep_gradients(zero.optimizer_swapper)
        self.stepped, shares = _layout_of_3(zero) if stage == 3 else _layout_of_1_and_2(zero)
        self.live = zero.fp16_partitioned_groups_flat if self.on_disk else self.stepped
        if stage == 3 and self.config.backend.offload == "none":
            # What it computes with is fp32 as well: no second copy of it is needed.
            for flat, working in zip(self.live, zero.fp16_partitioned_groups_flat, strict=True):
                flat.data = working.data
        for group, flat in enumerate(self.stepped):
            with self._in_memory(group, changed=True):
                make_state(self.optimizer, [flat])
        self.shares = {name: shares[id(p)] for name, p in parameters.items()}
        engine: nn.Module = self.engine
        return engine

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See Backend.micro_batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See Backend.backward."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def apply(self, hyper: Hyper, keep: Tensor | None = None) -> StepInfo:
        """See Backend.apply; DeepSpeed does wait for the device, to see if the norm is finite."""
        assert keep is None, "DeepSpeed steps on its own decision"
        set_hyper(self.optimizer, hyper)
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
        skipped = torch.tensor(float(self.engine.optimizer.overflow))
        if self.scaling is not None:
            self.scaling.update(skipped)
            self._follow_scale()
        return StepInfo(norm, skipped.to(self.device))

    def local_tensors(self) -> dict[str, Tensor]:
        """See Backend.local_tensors."""
        floating = {name: b for name, b in saved_buffers(self.model) if b.is_floating_point()}
        local = {name: share.of(self.live[share.group]) for name, share in self.shares.items()}
        return {**local, **floating}

    def canonical(self, name: str, local: Tensor) -> Tensor:
        """See Backend.canonical: a copy, divided along the first dimension; all ranks must call."""
        if name not in self.shares:  # a buffer, equal on all ranks
            return local
        return self._canonical(name, [local])[0]

    def _canonical(self, name: str, locals_: Sequence[Tensor]) -> list[Tensor]:
        """Put several tensors laid out like a parameter together at once: messages cost time."""
        share, shape = self.shares[name], self.shapes[name]
        wholes = torch.zeros(len(locals_), *shape, device=self.device)
        for flat, local in zip(wholes.view(len(locals_), -1), locals_, strict=True):
            flat[share.start : share.start + share.length] = local
        dist.all_reduce(wholes)
        return [self._divided(tensor) for tensor in wholes]

    def _divided(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        rows = -(-tensor.shape[0] // self.mesh.size())
        mine = tensor[rows * dist.get_rank() :][:rows].clone()  # the whole is not kept
        return DTensor.from_local(
            mine, self.mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride()
        )

    def local_part(self, name: str, tensor: Tensor) -> Tensor:
        """See Backend.local_part."""
        share = self.shares.get(name)
        if share is None:
            return tensor
        return whole(tensor).flatten()[share.start : share.start + share.length]

    def refresh(self) -> None:
        """See Backend.refresh."""
        zero = self.engine.optimizer
        if self.config.backend.zero_stage < 3:
            zero.update_lp_params()
            return
        zero.parameter_offload.partition_all_parameters()  # some may still be whole
        if self.on_disk:
            return  # what was written to is what it computes with
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """See Backend.export_state: copies, made one parameter at a time."""
        for group in range(len(self.live)):
            with self._in_memory(group):
                flats = self._flats(group)
                for name, share in self._shares_of(group):
                    wholes = self._canonical(name, [share.of(flat) for flat in flats.values()])
                    yield from zip((f"{kind}/{name}" for kind in flats), wholes, strict=True)
        for name, buffer in saved_buffers(self.model):
            yield f"buffer/{name}", buffer
        if self.scaling is not None:
            yield from self.scaling.tensors()
        yield "step", self._steps()[0].clone()

    @torch.no_grad()
    def import_state(self, state: CanonicalState) -> None:
        """See Backend.import_state."""
        for group, stepped in enumerate(self.stepped):
            with self._in_memory(group, changed=True):
                for name, share in self._shares_of(group):
                    for kind, flat in self._flats(group).items():
                        share.of(flat).copy_(self.local_part(name, state[f"{kind}/{name}"]))
                stepped.detach().copy_(self.live[group])  # a tensor of its own where on disk
        for name, buffer in saved_buffers(self.model):
            buffer.copy_(state[f"buffer/{name}"])
        for step in self._steps():
            step.copy_(state["step"])
        for name, held in self.scaling.tensors() if self.scaling is not None else ():
            held.copy_(state[name])
        self._follow_scale()
        self.refresh()

    def _follow_scale(self) -> None:
        """Let DeepSpeed multiply losses, and divide gradients, by the run's loss scale."""
        if self.scaling is not None:
            self.engine.optimizer.override_loss_scale(self.scaling.scale.item())

    def _shares_of(self, group: int) -> list[tuple[str, Share]]:
        return [(name, share) for name, share in self.shares.items() if share.group == group]

    def _flats(self, group: int) -> dict[str, Tensor]:
        """A group's flat tensors by what they hold, while it is in memory."""
        held = self.optimizer.state[self.stepped[group]]
        return {"weight": self.live[group], **{moment: held[moment] for moment in MOMENTS}}

    @contextmanager
    def _in_memory(self, group: int, *, changed: bool = False) -> Iterator[None]:
        """Have a group's moments in memory, and write them back to the disk if `changed`."""
        zero = self.engine.optimizer
        if not (self.on_disk and zero._swappable_optimizer_subgroup(group)):
            yield
            return
        zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if changed:
            zero._optimizer_states_and_gradient_swap_out(group)
        else:
            zero._release_swap_buffers(group)

    def _steps(self) -> list[Tensor]:
        return [held["step"] for held in self.optimizer.state.values()]


def _layout_of_1_and_2(zero: Any) -> tuple[list[Tensor], dict[int, Share]]:
    """Return the flat weights that are stepped, group by group, and shares by parameter id."""
    shares = {}
    for group, parameters in enumerate(zero.bit16_groups):
        for parameter in parameters:
            held = parameter._hp_mapping
            if held is None:  # all of it is on other ranks
                shares[id(parameter)] = Share(0, 0, group, 0)
                continue
            start, place = held.lp_fragment_address.start, held.hp_fragment_address
            shares[id(parameter)] = Share(start, place.numel, group, place.start)
    return zero.single_partition_of_fp32_groups, shares


def _layout_of_3(zero: Any) -> tuple[list[Tensor], dict[int, Share]]:
    """Return the same for stage 3, which divides each parameter evenly, padding its end."""
    shares = {}
    for group, parameters in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in parameters:
            part = parameter.partition_numel()
            start = min(dist.get_rank() * part, parameter.ds_numel)
            length = min(part, parameter.ds_numel - start)
            shares[id(parameter)] = Share(start, length, group, offset)
            offset += part
    return zero.fp32_partitioned_groups_flat, shares


def _deepspeed(device: torch.device) -> Any:
    """Return the module `deepspeed`, set to work with `device`.

    Raises:
        UserError: if it is not installed.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # by which it finds its GPU
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"backend.name zero1 to zero3 need DeepSpeed ({error}): pip install deepspeed, or use "
            "--backend.name fsdp"
        ) from None
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    # Sums in one machine's shared memory; it would be compiled now, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _check_disk(folder: Path) -> None:
    """Make sure that DeepSpeed can swap to `folder`, which is made.

    Raises:
        UserError: if its library is missing or cannot be compiled, or the disk is not fit.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "backend.offload_dir needs libaio, by which DeepSpeed reads and writes: install "
            "libaio-dev (on Red Hat libaio-devel), or leave it out for the CPU's memory"
        )
    probe = folder / f"probe_{dist.get_rank()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"backend.offload_dir: {folder} cannot be written past the page cache "
            f"({error.strerror}): give a folder on a disk of this machine"
        ) from None
    try:
        AsyncIOBuilder().load(verbose=False)
    except RuntimeError as error:
        raise UserError(
            f"backend.offload_dir needs what DeepSpeed could not compile "
            f"({str(error).splitlines()[0]}): install g++ and ninja, or leave it out"
        ) from None


def _keep_gradients(swapper: Any) -> None:
    """Leave gradients in memory until the step: those that DeepSpeed swaps come back wrong.

    It reads them straight to their places in the flat gradient, most of which are not aligned as
    such reads need it (seen with 0.19.8).
    """

    def keep(parameter: Any, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
        held = swapper.swap_params_info[parameter.ds_id].unswapped_gradients
        held.update(zip(gradient_offsets, gradient_tensors, strict=True))

    swapper.swap_out_gradients = keep
