"""Kernels against the definition in float64, and, in Triton's interpreter, what they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from models.kernels.choice import force

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Op = Callable[..., Tensor]


@dataclass
class Traffic:
    """Bytes that programs loaded and stored."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what kernels load and store in the interpreter, each time that they do."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        yield traffic


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill all memory that is handed out with NaN: what a kernel does not write will show."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def outputs(op: Op, inputs: Sequence[Tensor], form: str) -> list[Tensor]:
    """What an operator returns, and the gradients of its inputs, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with force(form), poisoned():
        out = op(*leaves)
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        grads = torch.autograd.grad(out, leaves, probe.to(out))
    return [tensor.detach().cpu().double() for tensor in (out, *grads)]


def check(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The kernels' value and gradients, against the definition's in float64.

    In float32 no number is off by more than 1e-5 of the largest. In another dtype errors are, in
    the mean square, half as large again as the definition's in that dtype at most, or one rounding.
    """
    inputs = [x.to(dtype) for x in inputs]
    exact = outputs(op, [x.double() for x in inputs], "eager")
    found = outputs(op, inputs, "triton")
    plain = outputs(op, inputs, "eager")
    for number, (value, like, truth) in enumerate(zip(found, plain, exact, strict=True)):
        if dtype == torch.float32:
            error = (value - truth).abs().max() / truth.abs().max().clamp_min(1e-30)
            limit = 1e-5
        else:
            length = truth.norm().clamp_min(1e-30)
            error, usual = ((x - truth).norm() / length for x in (value, like))
            limit = max(1.5 * usual, torch.finfo(dtype).eps / 2)
        assert error <= limit, f"output {number}: {error:.2e}, where {limit:.2e} is allowed"


def saved_addresses(op: Op, leaves: Sequence[Tensor]) -> list[int]:
    """Where the tensors lie that an operator's kernels save for the backward pass."""
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with force("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        op(*leaves)
    return [x.untyped_storage().data_ptr() for x in saved]


def check_one_graph(op: Op, leaves: Sequence[Tensor]) -> None:
    """The compiler makes one graph of an operator's kernels, with the same value and gradients."""
    compiled = torch.compile(op, fullgraph=True)
    with force("triton"):
        results = [function(*leaves) for function in (compiled, op)]
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in results]
    for one, other in zip([results[0], *grads[0]], [results[1], *grads[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
