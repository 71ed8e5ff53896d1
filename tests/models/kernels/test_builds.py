"""Kernels are built for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest

# Warps that a multiprocessor must hold for their loads to hide each other's latency.
WARPS = {
    "gated_conv_kernel": 32,
    "gated_conv_gradients_kernel": 12,
    # Tiles are loaded whole, so that few warps ask for much at once.
    "attention_kernel": 8,
    "query_gradients_kernel": 8,
    "attention_gradients_kernel": 8,
    "table_gradients_kernel": 8,
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_fits_every_target():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "docs/build_kernels.py", "--json"],
        env={**environment, "PYTHONPATH": "."}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(build["kernel"], build["dtype"], build["target"]) for build in builds}
    assert len(found) == len(WARPS) * 3 * 3
    for build in builds:
        assert build["stack"] == build["local"] == 0, build
        assert build["warps"] >= WARPS[build["kernel"]], build
