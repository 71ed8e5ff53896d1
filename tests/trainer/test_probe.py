"""The probe names the first tensor that went bad, in the order of computation."""

import pytest
import torch
from torch import nn

from trainer.probe import Probe


class Faulty(nn.Module):
    """Doubles; with a fault, one value of the output or of the gradient is not a number."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x):
        if self.fault == "forward":
            return x * torch.where(torch.arange(x.shape[-1]) == 2, torch.nan, 2.0)
        if self.fault == "backward":
            return 2 * x + 0 * (x - x).sqrt()  # its derivative is infinite where it is zero
        return 2 * x


def step(fault):
    model = nn.Sequential(nn.Linear(4, 4), Faulty(fault), nn.Linear(4, 3))
    probe = Probe()
    with probe.watching(model):
        model(torch.ones(2, 4)).sum().backward()
    return probe, model


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("forward", "output of 1: 2 of 8 values are not finite"),
        ("backward", "gradient at 0: 8 of 8 values are not finite"),
    ],
)
def test_the_first_bad_tensor_is_named(fault, said):
    probe, _ = step(fault)
    assert str(probe.first_bad()) == said


def test_where_all_is_finite_the_largest_are_named():
    probe, model = step(None)
    assert probe.first_bad() is None
    names = [look.name for look in probe.looks]
    order = ["output of 0", "output of 1", "output of the model", "gradient of 2.weight"]
    order += ["gradient at 1", "gradient at 0", "gradient of 0.weight"]
    assert [name for name in names if name in order] == order
    largest = probe.largest(3)
    assert largest == sorted(largest, key=lambda look: -look.largest)
    before = len(probe.looks)
    model(torch.ones(2, 4)).sum().backward()
    assert len(probe.looks) == before, "nothing is left of the hooks"
