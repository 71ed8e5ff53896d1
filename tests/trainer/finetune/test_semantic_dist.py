"""Losses and scores of several processes are those of all their pictures together."""

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.dist import run_distributed
from tests.trainer.finetune.drawings import HEADS, drawn, small
from tests.trainer.finetune.test_miou import by_counting
from trainer.finetune.heads.mask2former_loss import Prediction, mask2former_losses
from trainer.finetune.miou import ConfusionMatrix


def _share(rank, world_size):
    """What each of two ranks computes, in one gloo group: they take long to start."""
    return _mask_loss(rank), _scores(rank), [_step(rank, head) for head in HEADS]


def _mask_loss(rank):
    """The mask loss of a rank with one mask, or two, of constant logits."""
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    if rank == 1:
        labels[:, 4:] = 1
    masks = torch.zeros(1, 4, 8, 8)  # the cross-entropy is log 2 wherever it is sampled
    prediction = Prediction(torch.zeros(1, 4, 3), masks)
    return mask2former_losses([prediction, prediction], labels, num_points=20)["mask"].item()


def _pictures():
    generator = torch.Generator().manual_seed(2)
    return [
        [torch.randint(0, 4, (5, side), generator=generator) for _ in range(2)]
        for side in (3, 8, 5)
    ]


def _scores(rank):
    """The scores where rank 0 has all pictures but one, and asks twice."""
    matrix = ConfusionMatrix(4)
    for index, (predictions, labels) in enumerate(_pictures()):
        if (index == 1) == (rank == 1):
            matrix.update(predictions, labels)
    matrix.scores()
    scores = matrix.scores()
    return [scores.miou, scores.macc, scores.aacc, *scores.iou]


def _step(rank, head):
    """The gradients' norm of a step under DDP, in which rank 1 has nothing that counts."""
    model = DistributedDataParallel(small(head).train())
    images, labels = drawn(2, 32, 32, seed=rank)
    if rank == 1:
        labels.fill_(255)
    for _ in range(2):  # DDP finds a parameter without gradient at the step after
        model.zero_grad()
        sum(model(images, labels).values()).backward()
    return torch.nn.utils.get_total_norm([p.grad for p in _trained(model)]).item()


def _trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.slow
def test_processes_share_masks_counts_and_gradients():
    (loss_0, scores_0, norms_0), (loss_1, scores_1, norms_1) = run_distributed(
        _share, 2, timeout=300.0
    )
    # One mask on the first and two on the second are one and a half on average.
    mean = 5 * np.log(2) / 1.5
    assert [loss_0, loss_1] == pytest.approx([mean, 2 * mean])
    assert scores_0 == scores_1
    predictions, labels = (
        torch.cat([pair[place].flatten() for pair in _pictures()]).tolist() for place in (0, 1)
    )
    assert scores_0[:3] == pytest.approx(list(by_counting(predictions, labels, 4)))
    assert norms_0 == norms_1
    assert all(norm > 0 for norm in norms_0)
