"""Scores of segmentations against counting pixel by pixel."""

import math

import pytest
import torch

from trainer.finetune.miou import ConfusionMatrix


def by_counting(predictions, labels, num_classes):
    """Mean intersection over union, mean accuracy and accuracy, by loops over classes."""
    kept = [(p, t) for p, t in zip(predictions, labels, strict=True) if t != 255]
    ious, accuracies = [], []
    for label in range(num_classes):
        both = sum(p == label and t == label for p, t in kept)
        either = sum(p == label or t == label for p, t in kept)
        true = sum(t == label for _, t in kept)
        if either:
            ious.append(both / either)
        if true:
            accuracies.append(both / true)
    right = sum(p == t for p, t in kept)
    return sum(ious) / len(ious), sum(accuracies) / len(accuracies), right / len(kept)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_counting(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = ConfusionMatrix(9)
    everything = []
    for height in (7, 13, 20):
        labels = torch.randint(0, 6, (height, 11), generator=generator)  # 6 and 7 only predicted
        predictions = labels.clone()
        wrong = torch.rand(labels.shape, generator=generator) < 0.4
        predictions[wrong] = torch.randint(0, 8, (int(wrong.sum()),), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
        matrix.update(predictions, labels)
        everything += zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True)
    scores = matrix.scores()
    expected = by_counting(*zip(*everything, strict=True), 9)
    assert (scores.miou, scores.macc, scores.aacc) == pytest.approx(expected)
    assert math.isnan(scores.iou[8])  # neither labelled nor predicted
    assert scores.iou[7] == 0
    assert len(scores.iou) == 9


def test_right_predictions_score_one_and_nothing_scores_nan():
    matrix = ConfusionMatrix(3)
    assert math.isnan(matrix.scores().miou)
    labels = torch.tensor([[0, 1, 255]])
    matrix.update(torch.tensor([[0, 1, 2]]), labels)
    scores = matrix.scores()
    assert (scores.miou, scores.macc, scores.aacc) == (1, 1, 1)
