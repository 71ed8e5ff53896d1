"""EMA: a moving average of weights and floating-point buffers, over local shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Averages `tensors`, which stay those of the live model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._live = list(tensors.values())
        self.average = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the live tensors by 1 - decay."""
        torch._foreach_lerp_(list(self.average.values()), self._live, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the live model hold the average for as long as the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, average in zip(self._live, self.average.values(), strict=True):
            held = live.clone()
            live.copy_(average)
            average.copy_(held)
