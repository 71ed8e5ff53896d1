"""Deterministic mode: the same start on the same machines gives the same bits.

Everything random is keyed anyway; what is left are algorithms that add numbers up in the order in
which they happen to arrive, on GPUs above all.
"""

from __future__ import annotations

import os

import torch


def be_deterministic() -> None:
    """Use algorithms that give the same bits each time; an operation that has none raises.

    To be called before the first work of a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which takes the algorithm that is fastest at the time
    # Filling new memory costs a pass over each tensor, and nothing here reads what is not written.
    # torch makes this a property of the module, of which its type stubs know nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
