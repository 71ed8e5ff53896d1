"""Losses against torchvision's and against loops."""

import pytest
import torch
from torchvision import ops

from trainer.finetune.heads.dino.losses import focal_terms, mean_over_ranks, set_losses
from trainer.finetune.heads.dino.truth import Goals


def test_the_focal_loss_is_torchvisions():
    logits = torch.linspace(-30, 30, 121)
    present, absent = focal_terms(logits)
    for ours, target in ((present, torch.ones(121)), (absent, torch.zeros(121))):
        theirs = ops.sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2)
        torch.testing.assert_close(ours, theirs)


def case():
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 2, 4, 3), 0.3 + 0.3 * torch.rand(2, 2, 4, 4)
    labels = torch.tensor([[0, 3, 3, 2], [3, 3, 1, 3]]).expand(2, 2, 4)
    counted = torch.tensor([[True] * 4, [True, False, True, False]]).expand(2, 2, 4)
    return logits, boxes, Goals(labels, 0.3 + 0.3 * torch.rand(2, 2, 4, 4), counted)


def test_losses_are_the_weighted_sums_over_objects():
    logits, boxes, goals = case()
    found = set_losses(logits, boxes, goals, torch.tensor(3.0))
    for stage in range(2):
        classes = l1 = giou = 0.0
        for image in range(2):
            for query in range(4):
                label = int(goals.labels[stage, image, query])
                if goals.counted[stage, image, query]:
                    target = torch.eye(4)[label][:3]
                    one = logits[stage, image, query]
                    classes += float(ops.sigmoid_focal_loss(one, target).sum())
                if label < 3:
                    ours, theirs = boxes[stage, image, query], goals.boxes[stage, image, query]
                    l1 += float((ours - theirs).abs().sum())
                    pair = ops.box_convert(torch.stack([ours, theirs]), "cxcywh", "xyxy")
                    giou += float(ops.generalized_box_iou_loss(pair[0], pair[1]))
        assert found["class"][stage].item() == pytest.approx(classes / 3, rel=1e-5)
        assert found["l1"][stage].item() == pytest.approx(5 * l1 / 3, rel=1e-5)
        assert found["giou"][stage].item() == pytest.approx(2 * giou / 3, rel=1e-5)


def test_without_objects_boxes_lose_nothing_but_have_a_gradient():
    logits, boxes, goals = case()
    nothing = Goals(torch.full_like(goals.labels, 3), torch.zeros_like(boxes), goals.counted)
    boxes.requires_grad_()
    found = set_losses(logits, boxes, nothing, torch.tensor(1.0))
    (found["l1"] + found["giou"]).sum().backward()
    assert found["class"].min() > 0
    assert found["l1"].abs().max() == found["giou"].abs().max() == 0
    assert (boxes.grad == 0).all()


def test_a_single_process_divides_by_its_own_objects_but_never_by_none():
    assert mean_over_ranks(torch.tensor([7.0, 0.0])).tolist() == [7.0, 1.0]
