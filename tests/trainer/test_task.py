"""The loss against torch's own, and the penalty on the log-partition function."""

import torch
from torch.nn import functional as F

from trainer.task import classification


def logits_of(values):
    return lambda images, drop_noise: values


def test_soft_cross_entropy():
    values = torch.randn(6, 5, requires_grad=True)
    targets = torch.rand(6, 5).softmax(dim=1)
    loss = classification(logits_of(values), None, targets, None, z_loss=0.0)
    torch.testing.assert_close(loss.total, F.cross_entropy(values, targets))
    assert loss.parts["loss"] == loss.total


def test_z_loss_is_added_but_not_reported():
    """Shifting all logits leaves the cross-entropy alone, and is what the penalty sees."""
    values, targets = torch.zeros(4, 8), torch.full((4, 8), 1 / 8)
    for shift in (0.0, 3.0):
        loss = classification(logits_of(values + shift), None, targets, None, z_loss=1e-2)
        log_partition = torch.tensor(8.0).log() + shift
        torch.testing.assert_close(loss.parts["loss"], torch.tensor(8.0).log())
        torch.testing.assert_close(loss.total - loss.parts["loss"], 1e-2 * log_partition**2)
