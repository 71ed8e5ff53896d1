"""The same run under every backend, world size and way of computing: the same losses and state.

And a run that changes its backend and world size half-way goes on as if nothing had happened: from
any way to any other, and, of the model whose BatchNorm has buffers to bring along, by a new start
into every way and out of it. All keep a moving average. They are one file because they go on
from the same runs.
"""

from __future__ import annotations

from contextlib import closing
from itertools import islice, permutations, product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.dist import run_distributed
from tests.trainer.runs import copy_checkpoint, losses, make_trainer, tiny_config, train_named
from tests.trainer.ways import (
    ALONE,
    FSDP,
    SAVED,
    STEPS,
    WAYS,
    Way,
    assert_same_run,
    assert_same_state,
    assert_same_tensors,
    run_of,
    saved_state,
)
from trainer import manifest
from trainer.checkpoint import read_state
from trainer.loop import Trainer
from trainer.shares import whole
from trainer.state import TrainState

# TransXNet's BatchNorm has buffers, and statistics over all processes.
MODELS = ("transnext_pico", "transxnet_pico")
NORMED = ["--model.name", "transxnet_pico"]
KEEP = ["--memory.checkpointing", "selective"]
# Recomputation in bfloat16 has given NaN gradients on the CPU.
HALF = ["--train.precision", "bf16", "--memory.checkpointing", "1,3"]


class Case(NamedTuple):
    """What a run computes, and the way it does."""

    model: str
    precision: str
    accumulate: int
    way: str

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, in {self.accumulate}, {self.way}"

    def run(self, *arguments: str) -> Way:
        return run_of(
            WAYS[self.way],
            *("--model.name", self.model),
            *("--train.precision", self.precision),
            *("--train.accumulate", str(self.accumulate)),
            *arguments,
        )

    def alone(self) -> Case:
        return self._replace(way=ALONE)

    def exact(self) -> Case:
        return self._replace(precision="fp32", way=ALONE)


SPREAD = [way for way in WAYS if way != "fsdp on 3"]
# In bfloat16 every way accumulates one of the two models. TransXNet's BatchNorm sends many
# messages: where it accumulates in bfloat16 it does not in float32.
HALVED = [
    Case(model, "bf16", 2 - (index + turn) % 2, way)
    for (turn, model), (index, way) in product(enumerate(MODELS), enumerate(SPREAD))
]
ACCUMULATED = {(case.model, case.way) for case in HALVED if case.accumulate == 2}
EXACT = [
    Case(model, "fp32", accumulate, way)
    for model, accumulate, way in product(MODELS, (1, 2), SPREAD)
    if model == MODELS[0] or accumulate == 1 or (model, way) not in ACCUMULATED
]
# How far losses are from float32's and from one another's; measured are 0.0008 and 0.003.
ROUNDING = {"transnext_pico": 0.003, "transxnet_pico": 0.01}
PLAIN = Case(MODELS[0], "fp32", 1, ALONE)
# What else a way can be told: each computes what the case beside it does.
SPECIAL: dict[str, tuple[Case, Way]] = {
    "fsdp on 2, kept": (
        PLAIN,
        (2, [*FSDP, "--backend.reshard", "no", "--backend.prefetch", "2", *KEEP]),
    ),
    "fsdp on 3": (PLAIN, WAYS["fsdp on 3"]),
    "fsdp on 4, divided by 2, activations offloaded": (
        PLAIN,
        (4, [*FSDP, "--backend.reshard", "2", "--memory.offload-activations"]),
    ),
    "zero2 on 3, offloaded": (
        PLAIN,
        (3, ["--backend.name", "zero2", "--backend.offload", "optimizer"]),
    ),
    "fsdp on 2, recomputing": (
        PLAIN._replace(model=MODELS[1]),
        (2, [*FSDP, *NORMED, "--memory.checkpointing", "full"]),
    ),
}
RECOMPUTED = ("fsdp on 2", "zero3 on 2")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder in which every run has its own, by name."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {*EXACT, *HALVED, *(case.alone() for case in HALVED)}
    runs = {str(case): case.run() for case in sorted(cases)}
    left = [stayed(model, way) for model, way in product(MODELS, PLACES)]  # in the middle
    runs |= {str(case): case.run("--checkpoint.every", str(SAVED)) for case in left}
    runs |= {name: run_of(way) for name, (_, way) in SPECIAL.items()}
    runs |= {f"recomputed, {name}": run_of(WAYS[name], *HALF) for name in RECOMPUTED}
    train_named(folder, runs)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_the_run_learns(root, model):
    loss = losses(root / str(PLAIN._replace(model=model)))
    assert sorted(loss) == list(range(1, STEPS + 1))
    assert loss[STEPS] < loss[1] - 0.1


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_every_way_makes_the_same_steps(root, case):
    assert_same_run(root / str(case), root / str(case.alone()))
    assert_same_state(root / str(case), root / str(case.alone()))


def test_accumulation_does_not_change_the_step(root):
    """Without BatchNorm, whose statistics are a micro-batch's."""
    assert_same_run(root / str(PLAIN._replace(accumulate=2)), root / str(PLAIN))


@pytest.mark.parametrize("name", SPECIAL)
def test_ways_to_save_memory_and_messages_make_the_same_steps(root, name):
    assert_same_run(root / name, root / str(SPECIAL[name][0]))
    assert_same_state(root / name, root / str(SPECIAL[name][0]))


@pytest.mark.parametrize("case", HALVED, ids=str)
def test_bfloat16_is_near_float32_and_the_same_in_every_way_but_for_rounding(root, case):
    loss, near = losses(root / str(case)), ROUNDING[case.model]
    assert loss == pytest.approx(losses(root / str(case.exact())), abs=near, rel=0)
    assert loss == pytest.approx(losses(root / str(case.alone())), abs=near, rel=0)
    assert all(tensor.isfinite().all() for tensor in saved_state(root / str(case)).values())


@pytest.mark.parametrize("way", RECOMPUTED)
def test_bfloat16_recomputed_stays_finite_and_near(root, way):
    near = ROUNDING[PLAIN.model]
    loss = losses(root / f"recomputed, {way}")
    assert loss == pytest.approx(losses(root / str(PLAIN)), abs=near, rel=0)


PLACES = [way for way in WAYS if way not in ("ddp on 4", "fsdp on 1", "fsdp on 4")]
PAIRS = [*permutations(PLACES, 2)]
ROUND = [*zip(PLACES, [*PLACES[1:], PLACES[0]], strict=True)]


def stayed(model: str, way: str) -> Case:
    """The run that was made in one way throughout."""
    return Case(model, "fp32", 1, way)


@pytest.fixture(scope="module")
def moved(root, tmp_path_factory):
    """The folder of the runs that moved by a new start, by where they came from."""
    folder = tmp_path_factory.mktemp("moved")
    for before, _ in ROUND:
        copy_checkpoint(root / str(stayed(MODELS[1], before)), folder / before, step=SAVED)
    train_named(folder, {before: stayed(MODELS[1], after).run() for before, after in ROUND})
    return folder


@pytest.mark.parametrize(("before", "after"), ROUND)
def test_a_new_start_goes_on_in_another_way(root, moved, before, after):
    expected = root / str(stayed(MODELS[1], before))
    assert sorted(losses(moved / before)) == list(range(SAVED + 1, STEPS + 1))
    assert_same_run(moved / before, expected)
    assert_same_state(moved / before, expected)


@pytest.fixture(scope="module")
def gone_on(root, tmp_path_factory):
    """By (before, after): the losses after each move of PAIRS, and the state that they led to."""
    folder, found = tmp_path_factory.mktemp("gone on"), {}
    for world_size in {WAYS[way][0] for way in PLACES}:
        places = [way for way in PLACES if WAYS[way][0] == world_size]
        configs = [
            tiny_config(folder / way, *stayed(MODELS[0], way).run()[1]).to_json() for way in places
        ]
        runs = [
            [str(root / str(stayed(MODELS[0], before))) for before in PLACES if before != after]
            for after in places
        ]
        ways = run_distributed(_go_on, world_size, configs, runs, timeout=1200)[0]
        for after, results in zip(places, ways, strict=True):
            others = [before for before in PLACES if before != after]
            found |= {(way, after): result for way, result in zip(others, results, strict=True)}
    return found


Result = tuple[list[float], dict[str, Tensor]]


def _go_on(
    rank: int, world_size: int, configs: list[str], runs: list[list[str]]
) -> list[list[Result]]:
    """In the way of each configuration, continue its runs from their middle, one after another."""
    found = []
    for config, run_dirs in zip(configs, runs, strict=True):
        trainer = make_trainer(rank, world_size, config)
        found.append([_go_on_from(trainer, Path(run_dir)) for run_dir in run_dirs])
        trainer.watchdog.close()
    return found


def _go_on_from(trainer: Trainer, run_dir: Path) -> Result:
    engine, made = trainer.engine, []
    folder = manifest.step_folder(run_dir / "checkpoints", SAVED)
    state = dict(engine.state())
    read_state(folder, state, whole=True)
    engine.take(state)
    trainer.state = TrainState.from_dict(manifest.read(folder).record["state"])
    stream = trainer.pipeline.batches(trainer.state.cursor, engine.backend.data_shard)
    with closing(stream):
        while trainer.state.step < STEPS:
            loss = trainer.advance(list(islice(stream, 1)))["loss"]
            dist.all_reduce(loss)
            made.append(loss.item() / dist.get_world_size())
    found = {name: whole(tensor).clone() for name, tensor in engine.state()}
    return made, found if dist.get_rank() == 0 else {}


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_state_of_any_way_goes_on_in_any_other(root, gone_on, before, after):
    run_dir = root / str(stayed(MODELS[0], before))
    made, state = gone_on[before, after]
    expected = [loss for step, loss in losses(run_dir).items() if step > SAVED]
    assert made == pytest.approx(expected, abs=1e-5, rel=0)
    assert_same_tensors(state, saved_state(run_dir))
