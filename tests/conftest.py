"""Tests run on the CPU, so that they are the same on every machine; `pytest -m gpu` on a GPU."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA starts, and for every child
