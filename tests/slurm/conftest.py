"""A cluster for each module of tests that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A running cluster of four nodes."""
    if why := missing():
        pytest.skip(why)
    with Cluster() as running:
        yield running
