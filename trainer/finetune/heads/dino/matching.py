"""Which query is to find which object: the cheapest one-to-one assignment."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .boxes import generalized_iou, to_corners
from .losses import focal_terms
from .truth import Goals, Truth

CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, truth: Truth) -> Goals:
    """Return goals [S, B, Q] of the predictions of S stages.

    `logits` are [S, B, Q, classes], `boxes` [S, B, Q, 4]. Each object gets the one query of a
    stage, if there are enough, for which the sum of all costs is least; other queries get nothing.
    """
    stages, _, queries, num_classes = logits.shape
    places = []
    for image, count in enumerate(truth.counts):
        labels, known = truth.labels[image, :count], truth.boxes[image, :count]
        costs = _costs(logits[:, image], boxes[:, image], labels, known).double().cpu().numpy()
        for stage in range(stages):
            for query, index in zip(*assign(costs[stage]), strict=True):
                places.append((stage, image, int(query), int(index)))
    where = torch.tensor(places, dtype=torch.int64).reshape(-1, 4).to(logits.device)
    stage_of, image_of, query_of, index_of = where.unbind(1)
    labels = truth.labels.new_full((stages, len(truth.counts), queries), num_classes)
    labels[stage_of, image_of, query_of] = truth.labels[image_of, index_of]
    known = torch.zeros_like(boxes)
    known[stage_of, image_of, query_of] = truth.boxes[image_of, index_of]
    return Goals(labels, known, torch.ones_like(labels, dtype=torch.bool))


def _costs(logits: Tensor, boxes: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """What it would cost for each query to find each of n objects, [S, Q, n]."""
    present, absent = focal_terms(logits)
    as_class = (present - absent)[..., labels]
    apart = (boxes[:, :, None] - known).abs().sum(-1)
    similar = generalized_iou(to_corners(boxes)[:, :, None], to_corners(known))
    return CLASS_COST * as_class + L1_COST * apart - GIOU_COST * similar


def assign(costs: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows and columns of the cheapest assignment for costs [rows, columns].

    As many pairs as the shorter side is long, each row and column at most once: the Hungarian
    method, by shortest augmenting paths with potentials. A cost that is no number counts as too
    high to be chosen.
    """
    costs = np.nan_to_num(costs, nan=1e9, posinf=1e9, neginf=-1e9)
    if costs.shape[0] > costs.shape[1]:
        columns, rows = assign(costs.T)
        return rows, columns
    owner = np.full(costs.shape[1], -1)
    row_potential, column_potential = np.zeros(costs.shape[0]), np.zeros(costs.shape[1])
    for row in range(costs.shape[0]):
        _augment(row, costs, owner, row_potential, column_potential)
    columns = np.flatnonzero(owner >= 0)
    return owner[columns], columns


def _augment(
    row: int,
    costs: NDArray[np.float64],
    owner: NDArray[np.int64],
    row_potential: NDArray[np.float64],
    column_potential: NDArray[np.float64],
) -> None:
    """Give `row` a column, moving owners along the cheapest path that ends in a free column."""
    distance = np.full(len(owner), np.inf)
    before = np.full(len(owner), -1)  # the column that the path comes from
    done = np.zeros(len(owner), dtype=bool)
    current, travelled, column = row, 0.0, -1
    while True:
        through = travelled + costs[current] - row_potential[current] - column_potential
        nearer = ~done & (through < distance)
        distance[nearer], before[nearer] = through[nearer], column
        column = int(np.where(done, np.inf, distance).argmin())
        travelled = float(distance[column])
        if owner[column] < 0:
            break
        done[column] = True
        current = int(owner[column])
    spared = travelled - distance[done]
    row_potential[row] += travelled
    row_potential[owner[done]] += spared
    column_potential[done] -= spared
    while before[column] >= 0:
        owner[column] = owner[before[column]]
        column = int(before[column])
    owner[column] = row
