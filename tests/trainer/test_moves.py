"""A run that changes its backend and its world size half-way goes on as if nothing had happened.

From every way to every other, and, of the model whose BatchNorm has buffers to bring along, once
into every way and once out of it. All keep a moving average.
"""

from __future__ import annotations

from itertools import permutations

import pytest

from tests.trainer.runs import copy_checkpoint, losses, train_named
from tests.trainer.ways import SAVED, STEPS, WAYS, assert_same_run, assert_same_state, run_of

PLACES = [way for way in WAYS if way not in ("ddp on 4", "fsdp on 1", "fsdp on 4")]
NORMED = "transxnet_pico"
MOVES = [
    *(("transnext_pico", *move) for move in permutations(PLACES, 2)),
    *((NORMED, *move) for move in zip(PLACES, [*PLACES[1:], PLACES[0]], strict=True)),
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of the runs that stayed where they were and of those that moved, by name."""
    folder = tmp_path_factory.mktemp("runs")
    stayed = {f"{model}, {way}": _run(model, way) for model, way, _ in MOVES}
    train_named(folder, stayed)
    moved = {}
    for model, before, after in MOVES:
        name = f"{model}, {before} -> {after}"
        copy_checkpoint(folder / f"{model}, {before}", folder / name, step=SAVED)
        moved[name] = _run(model, after)
    train_named(folder, moved)
    return folder


def _run(model: str, way: str) -> tuple[int, list[str]]:
    return run_of(WAYS[way], "--model.name", model, "--checkpoint.every", str(SAVED))


@pytest.mark.parametrize(("model", "before", "after"), MOVES)
def test_a_checkpoint_goes_on_in_any_other_way(root, model, before, after):
    moved, stayed = root / f"{model}, {before} -> {after}", root / f"{model}, {before}"
    assert sorted(losses(moved)) == list(range(SAVED + 1, STEPS + 1))
    assert_same_run(moved, stayed)
    assert_same_state(moved, stayed)
