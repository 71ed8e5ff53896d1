"""Tests run on the CPU, so that they are the same on every machine; `pytest -m gpu` on a GPU."""

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA starts, and for every child
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are read


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What may take longest comes first: at the end all processes have something to do.
    items.sort(key=_patience, reverse=True)


def _patience(item: pytest.Item) -> tuple[float, bool]:
    timeout = item.get_closest_marker("timeout")
    return timeout.args[0] if timeout else 0, item.get_closest_marker("slow") is not None


@pytest.fixture(scope="session")
def stamps() -> Path:
    """The pictures of `foveate data fetch stamps`, which all test processes fetch but once."""
    from data.stamps import fetch_stamps  # after pytest_configure

    folder = Path(__file__).resolve().parents[1] / "datasets" / "stamps"
    fetch_stamps(folder)
    return folder
