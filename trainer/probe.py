"""The probe: where in a step the first value stopped being a number.

It looks at what every module gives, at the gradients of that, at the gradients of parameters and at
the weights after the update, in the order in which they are computed. Each look waits for the
device: it is for replaying a step, not for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Look:
    """One tensor: what it is, how many of its values are not finite, and its largest magnitude."""

    name: str
    bad: int
    total: int
    largest: float

    def __str__(self) -> str:
        if self.bad:
            return f"{self.name}: {self.bad} of {self.total} values are not finite"
        return f"{self.name}: at most {self.largest:.4g}"


class Probe:
    """What was seen of a step, in order."""

    def __init__(self) -> None:
        self.looks: list[Look] = []

    def first_bad(self) -> Look | None:
        """Return the first tensor with values that are not finite."""
        return next((look for look in self.looks if look.bad), None)

    def largest(self, count: int) -> list[Look]:
        """Return the `count` finite tensors of the largest values, largest first."""
        finite = [look for look in self.looks if not look.bad]
        return sorted(finite, key=lambda look: -look.largest)[:count]

    @torch.no_grad()
    def look(self, name: str, tensor: Tensor) -> None:
        """Look at a floating-point tensor, of a sharded one at this process's part."""
        values = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if values.numel() > 0:
            finite = values.isfinite()
            largest = torch.where(finite, values.double().abs(), 0.0).max().item()
            self.looks.append(Look(name, int((~finite).sum()), values.numel(), largest))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look at all that `model` computes inside."""
        handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(self._after(name or "the model")))
        for name, parameter in model.named_parameters():
            add = parameter.register_post_accumulate_grad_hook
            handles.append(add(self._gradient(name)))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, list | tuple) else [output]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.look(f"output of {name}", tensor)
                    if tensor.requires_grad:
                        tensor.register_hook(  # type: ignore[no-untyped-call]
                            lambda g: self.look(f"gradient at {name}", g)
                        )

        return hook

    def _gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.look(f"gradient of {name}", parameter.grad)

        return hook
