"""A run that changes its backend and its world size half-way goes on as if nothing had happened.

TransXNet, whose BatchNorm has buffers, with a moving average, from every way to every other.
"""

from __future__ import annotations

from itertools import permutations

import pytest

from tests.trainer.runs import copy_checkpoint, losses, train_named
from tests.trainer.ways import SAVED, STEPS, WAYS, assert_same_run, assert_same_state, run_of

PLACES = [way for way in WAYS if way not in ("ddp on 4", "fsdp on 1", "fsdp on 4")]
MOVES = [f"{before} -> {after}" for before, after in permutations(PLACES, 2)]
NORMED = ["--model.name", "transxnet_pico", "--checkpoint.every", str(SAVED)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of the runs that stayed where they were and of those that moved, by name."""
    folder = tmp_path_factory.mktemp("runs")
    train_named(folder, {way: run_of(WAYS[way], *NORMED) for way in PLACES})
    moved = {}
    for move in MOVES:
        before, after = move.split(" -> ")
        copy_checkpoint(folder / before, folder / move, step=SAVED)
        moved[move] = run_of(WAYS[after], *NORMED)
    train_named(folder, moved)
    return folder


@pytest.mark.parametrize("move", MOVES)
def test_a_checkpoint_goes_on_in_any_other_way(root, move):
    before, _ = move.split(" -> ")
    assert sorted(losses(root / move)) == list(range(SAVED + 1, STEPS + 1))
    assert_same_run(root / move, root / before)
    assert_same_state(root / move, root / before)
