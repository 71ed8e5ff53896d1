"""Exact accuracy: every image counted once on any number of ranks, padding never."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from data.augment import EvalSpec
from data.base import Shard, Stopped
from data.folder import SyntheticSource
from data.pipeline import eval_batches
from tests.dist import run_distributed
from trainer.evaluate import evaluate

SPEC = EvalSpec(size=8, crop_pct=0.875, squash=False)
CASES = {"ten": (23, 10), "three": (23, 3), "two": (5, 2)}  # images and classes


class Network(nn.Module):
    """A fixed random linear map; in training mode its dropout would ruin it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(num_classes, 3 * 8 * 8, generator=generator)
        self.weight = nn.Parameter(weight)
        self.dropout = nn.Dropout(0.9)

    def forward(self, images):
        return nn.functional.linear(self.dropout(images).flatten(1), self.weight)


def normalize(images):
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] around 0."""
    return images.permute(0, 3, 1, 2).float() / 255 - 0.5


def source_of(name):
    num_samples, num_classes = CASES[name]
    return SyntheticSource(num_samples=num_samples, num_classes=num_classes, size=10)


def measured(name, shard, *, stop=lambda: False, come=lambda batches: batches):
    network = Network(CASES[name][1]).train()
    batches = eval_batches(source_of(name), SPEC, batch_size=4, shard=shard)
    result = evaluate(network, come(batches), normalize=normalize, stop=stop)
    return {"result": result, "training": network.training}


def first_alone(batches):
    yield next(batches)
    raise Stopped


def evaluate_everything(rank, world_size):
    """Every case whole, then one that is stopped after its first batch, or waiting for another."""
    shard = Shard(rank=rank, world_size=world_size)
    answers = {name: measured(name, shard) for name in CASES}
    calls = iter([False, True])
    answers["stopped"] = measured("ten", shard, stop=lambda: next(calls))
    answers["stopped in waiting"] = measured("ten", shard, come=first_alone)
    return answers


def expected(name):
    """Percentages by a direct computation over the whole split in one batch."""
    source = source_of(name)
    network = Network(CASES[name][1]).eval()
    images = np.empty((len(source), SPEC.size, SPEC.size, 3), np.uint8)
    SPEC.render([source.read(id) for id in range(len(source))], images)
    with torch.no_grad():
        logits = network(normalize(torch.from_numpy(images)))
    ranking = logits.argsort(dim=1, descending=True).tolist()
    labels = source.labels.tolist()
    pairs = list(zip(ranking, labels, strict=True))
    return {
        f"top{k}": 100 * sum(label in row[:k] for row, label in pairs) / len(pairs) for k in (1, 5)
    }


@pytest.fixture(scope="module", params=[1, 2])
def answers(request):
    return run_distributed(evaluate_everything, request.param)


def test_accuracy_equals_a_direct_computation_on_every_rank(answers):
    for name in CASES:
        truth = expected(name)
        for answer in answers:
            assert answer[name]["result"] == pytest.approx(truth, rel=1e-12), name
            assert answer[name]["training"]
    assert expected("ten") != {"top1": 0.0, "top5": 100.0}, "the case tells something"


def test_fewer_than_five_classes_are_always_within_five(answers):
    for answer in answers:
        assert answer["three"]["result"]["top5"] == 100.0
        assert answer["three"]["result"]["top1"] < 100.0


def test_stopping_midway_gives_no_result_and_goes_back_to_training(answers):
    for answer in answers:
        for case in ("stopped", "stopped in waiting"):
            assert answer[case] == {"result": None, "training": True}


def test_an_error_midway_goes_back_to_training():
    def broken():
        yield next(
            eval_batches(source_of("ten"), SPEC, batch_size=4, shard=Shard(rank=0, world_size=1))
        )
        raise OSError("the disk is gone")

    network = Network(10).train()
    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(network, broken(), normalize=normalize, stop=lambda: False)
    assert network.training
