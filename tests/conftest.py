"""Tests run on the CPU, so that they are the same on every machine; `pytest -m gpu` on a GPU."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA starts, and for every child


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Slow files first: at the end all processes have something to do.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
