"""FSDP2: weights, gradients and optimizer state divided over all processes, block by block."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from models.base import Backbone
from trainer.config import UserError

from .base import TorchBackend


class FSDPBackend(TorchBackend):
    """Gathers a residual block's weights just before it runs and frees them after."""

    def wrap(self, model: Backbone) -> nn.Module:
        """See TorchBackend.wrap.

        Raises:
            UserError: if a parameter is a single number, which cannot be divided.
        """
        numbers = [name for name, p in model.named_parameters() if p.dim() == 0]
        if numbers:
            raise UserError(
                f"FSDP cannot divide {numbers[0]}, a single number: use --backend.name ddp"
            )
        reshard = self.config.backend.reshard_after_forward()
        self._mesh = _mesh(self.device, replicas=self.config.backend.replicas)
        blocks = [block.module for block in model.blocks() if block.residual]
        for module in (*blocks, model):
            fully_shard(module, mesh=self._mesh, reshard_after_forward=reshard)
        _prefetch(cast(list[FSDPModule], blocks), self.config.backend.prefetch)
        self._root = cast(FSDPModule, model)
        self._layouts = dict(model.named_parameters())
        return model

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See Backend.micro_batch."""
        self._root.set_requires_gradient_sync(last)
        return nullcontext()

    def local(self, tensor: Tensor) -> Tensor:
        """See TorchBackend.local."""
        return cast(DTensor, tensor).to_local()

    def canonical(self, name: str, local: Tensor) -> Tensor:
        """See Backend.canonical."""
        layout = self._layouts.get(name)
        if layout is None:  # a buffer, equal on all ranks
            return local
        whole = cast(DTensor, layout)
        return DTensor.from_local(
            local, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride()
        )

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """See TorchBackend.sum_over_shards."""
        dist.all_reduce(value, group=self._mesh.get_group("shard"))
        return value

    def refresh(self) -> None:
        """See Backend.refresh: weights that stayed gathered after an evaluation are stale."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _mesh(device: torch.device, *, replicas: int) -> DeviceMesh:
    """All processes in a row, or `replicas` rows, each of which divides a copy of the state."""
    world_size = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (replicas, world_size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))


def _prefetch(blocks: list[FSDPModule], count: int) -> None:
    """Let each block gather the weights of the next `count` that run, in both directions."""
    if count == 0:
        return
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + count])
        before = blocks[max(index - count, 0) : index]
        block.set_modules_to_backward_prefetch(before[::-1])
