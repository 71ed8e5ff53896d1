"""What every backbone is: the contract that the trainer, the backends and the exports rely on.

Invariant: a backbone knows no parallelism. `Backbone.blocks()` is the one description that
activation checkpointing, compilation, sharding, layer-wise decay and per-stage metrics read.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class ModelError(ValueError):
    """A mistake of the user about a model: what, where, the value and the remedy in one message."""


STAGES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Block:
    """One part of a backbone; the parts of `Backbone.blocks()` hold every parameter exactly once.

    `name` is the module's path, and so the prefix of its parameters' names. `stage` is 1 to 4.
    `depth` counts the residual blocks before the part: residual blocks have depth 0, 1, 2, ... in
    order, a stem has 0, the head has their number: what layer-wise decay counts. `residual` marks
    the blocks proper, which activation checkpointing, compilation and per-block sharding wrap; the
    remaining parts (stem, patch embeddings, norms, head) stay with the root.
    """

    name: str
    module: nn.Module
    stage: int
    depth: int
    residual: bool = True


class Backbone(nn.Module, ABC):
    """A hierarchical vision backbone with four stages and a linear head.

    Subclasses set `num_classes`, `size` (the input height and width that the buffers fit),
    `drop_path` (one rate for each residual block) and `feature_info` (for each stage its
    `num_chs`, `reduction` and `module`). Set `drop_share` to let that share of the rates hold; it
    may change from step to step without compiling anything again.
    """

    num_classes: int
    size: tuple[int, int]
    drop_path: tuple[float, ...]
    drop_share: float = 1.0
    feature_info: list[dict[str, Any]]

    @abstractmethod
    def blocks(self) -> list[Block]:
        """Every part in the order of the forward pass; see `Block`."""

    def parameter_stages(self) -> dict[str, int]:
        """The stage, 1 to 4, of every parameter by name."""
        return {
            f"{block.name}.{name}": block.stage
            for block in self.blocks()
            for name, _ in block.module.named_parameters()
        }

    @abstractmethod
    def init_weights(self) -> None:
        """Initialise all parameters and persistent buffers, in place, as published.

        Works on parameters just materialised from the meta device.
        """

    @abstractmethod
    def reset_buffers(self, size: tuple[int, int]) -> None:
        """Compute the buffers that depend on resolution for inputs of `size` (height, width).

        They are a function of the size alone, computed by arithmetic on the parameters' device.
        """

    @abstractmethod
    def no_weight_decay(self, name: str, parameter: Tensor) -> bool:
        """Whether the published recipe leaves this parameter out of weight decay."""

    @abstractmethod
    def stages(self, x: Tensor, drop_noise: Tensor | None) -> list[Tensor]:
        """The four stage outputs [B, C, H, W] of images already checked, noise already drawn."""

    @abstractmethod
    def pool(self, x: Tensor) -> Tensor:
        """What the linear head sees [B, C] of the last stage's output [B, C, H, W]."""

    @abstractmethod
    def classify(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] from the last stage's output [B, C, H, W]."""

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear head by a fresh one; 0 classes leave the pooled features."""

    def forward_features(self, x: Tensor, drop_noise: Tensor | None = None) -> list[Tensor]:
        """The four stage outputs [B, C_i, H_i, W_i] of images `x` [B, 3, H, W].

        `drop_noise` is float32 [num_blocks, 2, B], uniform in [0, 1): it decides which residual
        branch of which sample is dropped (where it is below the block's rate), so drop path is a
        function of the caller's keys. In training with positive rates None draws it here;
        in evaluation it is ignored. Raises ModelError if the input size is not `size`.
        """
        if x.dim() != 4 or x.shape[1] != 3 or tuple(x.shape[2:]) != self.size:
            raise ModelError(
                f"{type(self).__name__}: images of shape {tuple(x.shape)} do not fit: the model "
                f"is set for [B, 3, {self.size[0]}, {self.size[1]}]; resize the images, build "
                "with that img_size or call reset_buffers((height, width)) first"
            )
        return self.stages(x, self._noise(x, drop_noise))

    def forward(self, x: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes] of images `x` [B, 3, H, W]; see `forward_features`."""
        return self.classify(self.forward_features(x, drop_noise)[-1])

    @property
    def num_blocks(self) -> int:
        """The number of residual blocks."""
        return len(self.drop_path)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def _noise(self, x: Tensor, drop_noise: Tensor | None) -> Tensor | None:
        if not self.training or max(self.drop_path) == 0:
            return None
        if drop_noise is None:
            return torch.rand(self.num_blocks, 2, x.shape[0], device=x.device)
        return drop_noise

    def _keep(self, drop_noise: Tensor | None) -> Tensor | None:
        """What each branch of each block is multiplied by [num_blocks, 2, B], if there is noise."""
        if drop_noise is None:
            return None
        # Made on the device: sending the rates there would wait for it.
        last = self.drop_path[-1] * self.drop_share
        rates = torch.linspace(0, last, self.num_blocks, device=drop_noise.device)
        return keep_scale(drop_noise, rates[:, None, None])


def drop_path_rates(rate: float, *, num_blocks: int) -> tuple[float, ...]:
    """Rates that rise linearly from 0 at the first block to `rate` at the last."""
    if not 0 <= rate < 1:
        raise ModelError(f"drop_path is {rate}; it must be at least 0 and below 1")
    return tuple(rate * index / max(num_blocks - 1, 1) for index in range(num_blocks))


def keep_scale(noise: Tensor, rate: float | Tensor) -> Tensor:
    """What drop path (stochastic depth, arXiv 1603.09382) multiplies residual branches by.

    `noise` is uniform in [0, 1): 0 where it is below `rate`, 1 / (1 - rate) elsewhere.
    """
    return (noise >= rate) / (1 - rate)


def stage_grids(size: tuple[int, int], *, stem_stride: int) -> list[tuple[int, int]]:
    """The four stage grids of an input of `size`: each convolution rounds its grid up.

    Written as convolutions say it, so that sizes which are symbols are seen to be theirs.
    """
    height, width = size
    grids = []
    for stride in (stem_stride, 2, 2, 2):
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        grids.append((height, width))
    return grids
