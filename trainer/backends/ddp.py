"""DDP: every process holds the whole training state. Also serves a single process."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.base import Backbone

from .base import TorchBackend


class DDPBackend(TorchBackend):
    """Replicates the model; gradients are averaged while the backward pass runs."""

    def wrap(self, model: Backbone) -> nn.Module:
        """See TorchBackend.wrap."""
        # A depthwise weight's gradient comes with strides that differ where a size is 1: harmless.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # BatchNorm keeps its own statistics equal on all ranks.
        self._ddp = DistributedDataParallel(model, forward_sync_buffers=False)
        return self._ddp

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """See Backend.micro_batch."""
        return nullcontext() if last else self._ddp.no_sync()

    def local(self, tensor: Tensor) -> Tensor:
        """See TorchBackend.local."""
        return tensor

    def canonical(self, name: str, local: Tensor) -> Tensor:
        """See Backend.canonical."""
        return local

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """See TorchBackend.sum_over_shards."""
        return value
