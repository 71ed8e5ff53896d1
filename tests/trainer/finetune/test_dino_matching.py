"""Matching: the cheapest assignment, and what it makes of predictions."""

import itertools

import numpy as np
import pytest
import torch
from torchvision import ops

from trainer.finetune.heads.dino.matching import assign, match
from trainer.finetune.heads.dino.truth import Truth, gather_truth


def cheapest(costs):
    """The least total over every way to give each row (there are at most as many) a column."""
    rows, columns = costs.shape
    return min(
        sum(costs[row, column] for row, column in enumerate(chosen))
        for chosen in itertools.permutations(range(columns), rows)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 3), (4, 6), (5, 7), (6, 6), (6, 4), (7, 2)])
def test_no_other_assignment_is_cheaper(shape):
    generator = np.random.default_rng(shape)
    for trial in range(20):
        # Whole numbers, some negative, repeat often: ties are where a path goes wrong.
        costs = generator.normal(size=shape) if trial % 2 else generator.integers(-3, 4, shape)
        rows, columns = assign(costs.astype(np.float64))
        assert len(rows) == len(set(rows)) == len(set(columns)) == min(shape)
        wide = costs if shape[0] <= shape[1] else costs.T
        assert costs[rows, columns].sum() == pytest.approx(cheapest(wide))


def test_a_large_assignment_has_potentials_that_prove_it():
    """Exchanging the columns of any two rows, or taking a free column, is never cheaper."""
    costs = np.random.default_rng(0).normal(size=(60, 200))
    rows, columns = assign(costs)
    column_of = columns[np.argsort(rows)]
    own = costs[np.arange(60), column_of]
    swapped = costs[:, column_of]
    assert (swapped + swapped.T >= own[:, None] + own - 1e-9).all()
    free = np.setdiff1d(np.arange(200), column_of)
    assert (costs[:, free] >= own[:, None] - 1e-9).all()


def test_nothing_to_assign_is_no_pair():
    for shape in ((0, 5), (5, 0)):
        rows, columns = assign(np.zeros(shape))
        assert len(rows) == len(columns) == 0


def test_costs_that_are_no_numbers_are_avoided():
    costs = np.array([[np.nan, 1.0, np.inf], [2.0, np.nan, np.inf]])
    rows, columns = assign(costs)
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 1: 0}


def random_truth(counts, num_classes, seed=0):
    torch.manual_seed(seed)
    targets = [
        {
            "boxes": torch.cat([low := 50 * torch.rand(n, 2), low + 5 + 40 * torch.rand(n, 2)], 1),
            "labels": torch.randint(num_classes, (n,)),
        }
        for n in counts
    ]
    return gather_truth(targets, torch.tensor([[100.0, 200.0]]).expand(len(counts), 2))


def test_each_object_gets_the_queries_of_least_total_cost():
    truth = random_truth((3, 0, 2), num_classes=4)
    logits, boxes = torch.randn(2, 3, 6, 4), torch.rand(2, 3, 6, 4) * 0.5 + 0.1
    goals = match(logits, boxes, truth)
    shares = logits.sigmoid()
    for stage, image in itertools.product(range(2), range(3)):
        count = truth.counts[image]
        labels, known = truth.labels[image, :count], truth.boxes[image, :count]
        share = shares[stage, image][:, labels]
        present = 0.25 * (1 - share) ** 2 * -share.log()
        absent = 0.75 * share**2 * -(1 - share).log()
        apart = torch.cdist(boxes[stage, image], known, p=1)
        similar = ops.generalized_box_iou(
            ops.box_convert(boxes[stage, image], "cxcywh", "xyxy"),
            ops.box_convert(known, "cxcywh", "xyxy"),
        )
        costs = (2 * (present - absent) + 5 * apart - 2 * similar).T.numpy()
        taken = goals.labels[stage, image] < 4
        assert taken.sum() == count
        if count:
            index = (goals.boxes[stage, image][taken][:, None] == known).all(-1).int().argmax(1)
            assert sorted(index.tolist()) == list(range(count))
            assert torch.equal(goals.labels[stage, image][taken], labels[index])
            total = costs[index.numpy(), taken.nonzero()[:, 0].numpy()].sum()
            assert total == pytest.approx(cheapest(costs), abs=1e-4)


def test_more_objects_than_queries_leave_some_objects_out():
    truth = random_truth((5,), num_classes=2)
    goals = match(torch.randn(1, 1, 3, 2), torch.rand(1, 1, 3, 4), truth)
    assert (goals.labels < 2).all()


def test_truth_is_padded_to_the_image_with_the_most_objects():
    truth = random_truth((2, 0, 3), num_classes=4)
    assert truth.present.int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    empty = gather_truth(
        [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2,
        torch.ones(2, 2),
    )
    assert empty.boxes.shape == (2, 0, 4)
    assert isinstance(empty, Truth)
    assert not empty.present.any()
