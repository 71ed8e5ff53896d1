"""FSDP2: weights, gradients and optimizer state divided over all processes, block by block."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
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
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
        for block in model.blocks():
            if block.residual:
                fully_shard(block.module, mesh=mesh)
        # The root is resharded too: weights that stay gathered after an evaluation would be
        # stale as soon as the average is swapped in.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
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
        dist.all_reduce(value)
        return value
