"""The moving average against its closed form, and swapping that leaves no trace."""

import pytest
import torch

from trainer.ema import EMA

SHAPES = {"weight": (4, 3), "running_var": (4,), "empty": (0, 3)}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_bits(found, expected):
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9998])
def test_the_average_has_its_closed_form(decay):
    live = tensors(0)
    ema = EMA(live)
    history = [copies(live)]
    for seed in range(1, 11):
        for name, value in tensors(seed).items():
            live[name].copy_(value)
        ema.update(decay)
        history.append(copies(live))
    for name, average in ema.average.items():
        expected = decay**10 * history[0][name].double()
        for age, past in enumerate(reversed(history[1:])):
            expected += (1 - decay) * decay**age * past[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)
    assert_same_bits(live, history[-1])


def test_the_average_starts_at_the_live_weights_and_is_apart_from_them():
    live = tensors(0)
    ema = EMA(live)
    before = copies(live)
    assert_same_bits(ema.average, before)
    live["weight"].zero_()
    assert_same_bits(ema.average, before)


def awkward(seed):
    """Values that an arithmetic swap would lose: signed zeros, infinities, tiny and huge."""
    live = tensors(seed)
    live["running_var"].copy_(torch.tensor([-0.0, torch.inf, 1e-45, 3e38]))
    return live


def test_swapping_shows_the_average_and_restores_every_bit():
    live = awkward(0)
    ema = EMA(live)
    for name, value in tensors(1).items():
        live[name].copy_(value)
    before, average = copies(live), copies(ema.average)
    places = {name: tensor.data_ptr() for name, tensor in live.items()}
    with ema.swapped():
        assert_same_bits(live, average)
    assert_same_bits(live, before)
    assert_same_bits(ema.average, average)
    assert {name: tensor.data_ptr() for name, tensor in live.items()} == places


def test_an_exception_while_swapped_restores_every_bit():
    live = tensors(0)
    ema = EMA(live)
    for name, value in awkward(1).items():
        live[name].copy_(value)
    before, average = copies(live), copies(ema.average)
    with pytest.raises(KeyError, match="the evaluation"), ema.swapped():
        raise KeyError("the evaluation")
    assert_same_bits(live, before)
    assert_same_bits(ema.average, average)
