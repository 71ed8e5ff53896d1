"""Arithmetic of boxes against torchvision's."""

import torch
from torchvision import ops

from trainer.finetune.heads.dino.boxes import (
    generalized_iou,
    inverse_sigmoid,
    to_centres,
    to_corners,
)


def corners(count, seed):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator)
    return torch.cat([low, low + 0.01 + torch.rand(count, 2, generator=generator)], 1)


def test_corners_and_centres_are_torchvisions():
    boxes = corners(50, 0)
    torch.testing.assert_close(to_centres(boxes), ops.box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(to_corners(to_centres(boxes)), boxes)


def test_giou_of_all_pairs_is_torchvisions():
    one, other = corners(40, 1), corners(30, 2)
    found = generalized_iou(one[:, None], other)
    torch.testing.assert_close(found, ops.generalized_box_iou(one, other), rtol=1e-5, atol=1e-5)
    assert found.min() < 0 < found.max()


def test_the_gradient_of_giou_is_torchvisions():
    ours, theirs = (corners(20, 3).requires_grad_() for _ in range(2))
    other = corners(20, 4)
    (1 - generalized_iou(ours, other)).sum().backward()
    ops.generalized_box_iou_loss(theirs, other, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_boxes_without_an_area_leave_giou_and_its_gradient_finite():
    flat = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.3, 0.2, 0.9]], requires_grad=True)
    found = generalized_iou(flat, torch.tensor([0.5, 0.5, 0.5, 0.5]))
    found.sum().backward()
    assert found.isfinite().all()
    assert flat.grad.isfinite().all()


def test_logits_of_shares_stop_short_of_infinity():
    shares = torch.tensor([-1.0, 0.0, 0.3, 1.0, 2.0])
    back = inverse_sigmoid(shares).sigmoid()
    torch.testing.assert_close(back, torch.tensor([0.001, 0.001, 0.3, 0.999, 0.999]))
