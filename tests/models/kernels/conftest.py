"""Triton's interpreter with bfloat16 as GPUs have it.

Up to 3.9 it multiplies bfloat16 matrices by their bit patterns, and cuts numbers off where a GPU
rounds to the nearest.
"""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not before the interpreter was asked for.
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        bits = torch.from_numpy(x.data).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    def widened(self: Any, x: Any) -> Any:
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def widening_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(self, a), widened(self, b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widening_dot)
