"""Stragglers: who is named, and who is not."""

import itertools
import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.dist import run_distributed
from trainer.stragglers import Straggler, Stragglers, outliers

HOSTS = [f"n{rank:02d}" for rank in range(8)]


def test_a_rank_that_takes_much_longer_is_named_with_its_machine():
    seconds = [0.10, 0.11, 0.10, 0.09, 0.10, 0.19, 0.10, 0.11]
    assert outliers(seconds, HOSTS) == [
        Straggler(rank=5, host="n05", seconds=0.19, median=pytest.approx(0.1))
    ]


def test_ranks_that_differ_by_a_hair_are_not_named():
    assert outliers([0.1] * 7 + [0.11], HOSTS) == []
    assert outliers([0.0] * 8, HOSTS) == []


def test_of_two_ranks_neither_can_be_named():
    assert outliers([0.1, 9.0], HOSTS[:2]) == []


@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=8))
def test_only_the_slower_half_is_ever_named(seconds):
    named = [found.rank for found in outliers(seconds, HOSTS[: len(seconds)])]
    assert len(named) < len(seconds) / 2
    limit = 1.2 * sorted(seconds)[(len(seconds) - 1) // 2]
    assert all(seconds[rank] >= limit for rank in named)


def look(rank, world_size):
    """Time three passes by a clock that runs twice as fast on rank 1."""
    ticks = itertools.count(0, 2.0 if rank == 1 else 1.0)
    stragglers = Stragglers(torch.device("cpu"), dist.new_group(backend="gloo"))
    with mock.patch("time.perf_counter", side_effect=ticks):
        for _ in range(3):
            with stragglers.timing():
                pass
    return [vars(found) for found in stragglers.look()], stragglers.look() == []


def test_all_ranks_learn_who_is_slow_and_each_interval_stands_for_itself():
    host = socket.gethostname()
    named = [{"rank": 1, "host": host, "seconds": 2.0, "median": 1.0}]
    assert run_distributed(look, 3) == [(named, True)] * 3
