"""Precision: the compute type of a run, and the loss scale that fp16 needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_START, _LARGEST = 2.0**16, 2.0**24
_GROWTH_STEPS = 2000


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which matrix products and activations have the compute type."""
    dtype = _DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class LossScale:
    """A factor on the loss that keeps small gradients above fp16's smallest numbers.

    It is halved after a step whose gradients were not finite and doubled after 2,000 in a row that
    were (https://arxiv.org/abs/1710.03740, section 3.2). All of it stays on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(_START, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """Follow a step; `skipped` is 1.0 where its gradients were not finite, else 0.0."""
        self.good_steps.add_(1).mul_(1 - skipped)
        grown = (self.good_steps == _GROWTH_STEPS).float()
        self.good_steps.mul_(1 - grown)
        self.scale.mul_(1 - skipped / 2).mul_(1 + grown).clamp_(max=_LARGEST)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield its state by name; the tensors are the live ones."""
        yield "loss_scale/scale", self.scale
        yield "loss_scale/good_steps", self.good_steps
