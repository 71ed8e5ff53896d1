"""Each head learns drawn pictures by heart, in seconds."""

import pytest
import torch

from tests.trainer.finetune.drawings import HEADS, drawn, small
from trainer.finetune.miou import ConfusionMatrix

PACE = {"upernet": (1e-2, 80), "mask2former": (3e-3, 40), "semantic_fpn": (2e-2, 80)}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_drawn_pictures(head):
    images, labels = drawn(2, 48, 48)
    rate, steps = PACE[head]
    model = small(head).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    totals = []
    for _ in range(steps):
        losses = model(images, labels)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    matrix = ConfusionMatrix(3)
    with torch.no_grad():
        matrix.update(model.eval()(images).argmax(1), labels)
    assert totals[-1] < totals[0] / 2
    assert matrix.scores().miou > 0.8
