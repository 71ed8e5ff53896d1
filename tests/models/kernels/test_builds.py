"""Kernels are built for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Warps that a multiprocessor must hold for their loads to hide each other's latency.
WARPS = {
    "gated_conv_kernel": 32,
    "gated_conv_gradients_kernel": 12,
    # Fewer where a warp has hundreds of products of its own between its loads.
    "dynamic_conv_kernel": 8,
    "dynamic_conv_gradients_kernel": 8,
    "mixed_conv_kernel": 12,
    "mixed_conv_gradients_kernel": 8,
    "activated_gradient_kernel": 24,
    # Tiles are loaded whole, so that few warps ask for much at once.
    "attention_kernel": 8,
    "query_gradients_kernel": 8,
    "attention_gradients_kernel": 8,
    "relative_gradients_kernel": 8,
    "add_parts_kernel": 24,
    "table_gradients_kernel": 8,
    "aggregated_attention_kernel": 8,
    "aggregated_attention_gradients_kernel": 8,
}


def test_every_build_fits():
    """By the page that holds all of them, in every dtype and for every target."""
    lines = Path("docs/kernel_builds.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "| sm_" in line
    ]
    assert len({tuple(row[:3]) for row in rows}) == len(WARPS) * 3 * 3
    for kernel, _, _, registers, stack, local, _, warps in rows:
        assert int(registers) <= 255
        assert int(stack) == int(local) == 0, kernel
        assert int(warps) >= WARPS[kernel], kernel


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_is_of_these_kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "docs/build_kernels.py", "--check"],
        env={**environment, "PYTHONPATH": "."}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
