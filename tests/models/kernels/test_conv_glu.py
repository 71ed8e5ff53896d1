"""The gated convolution's kernels, in the interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import conv_glu
from models.kernels.choice import choose, force
from models.kernels.triton_conv_glu import gated_conv, gated_conv_gradients
from tests.models.kernels.interpreter import (
    DTYPES,
    check,
    check_one_graph,
    counted_traffic,
    saved_addresses,
)

# One pixel, one row, borders within a strip, several blocks of channels.
SHAPES = [(1, 1, 1, 5), (2, 1, 4, 16), (1, 5, 3, 20), (2, 9, 2, 24), (1, 4, 3, 140)]


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(shape, width=6):
    channels = shape[-1]
    return [
        randn(1, *shape),
        randn(2, *shape),
        randn(3, channels, 1, 3, 3),
        randn(4, channels),
        randn(5, width, channels),
        randn(6, width),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, dtype):
    check(conv_glu, inputs(shape), dtype)


def test_little_is_moved_twice():
    """Of the maps of stage 1 at 224 pixels, narrowed."""
    gate, value, weight, bias, *_ = inputs((1, 56, 8, 128))
    map_bytes = gate.numel() * 4
    with counted_traffic() as forward:
        gated_conv(gate, value, weight, bias)
    with counted_traffic() as backward:
        gated_conv_gradients(gate, gate, value, weight, bias)
    assert forward.total <= 1.3 * 3 * map_bytes
    assert backward.total <= 1.6 * 6 * map_bytes


def test_its_operators_are_sound():
    gate, value, weight, bias, *_ = inputs((1, 5, 3, 20))
    torch.library.opcheck(gated_conv, (gate, value, weight, bias))
    torch.library.opcheck(gated_conv_gradients, (gate, gate, value, weight, bias))


def test_it_saves_its_inputs_alone():
    leaves = [x.requires_grad_() for x in inputs((1, 5, 3, 20))]
    addresses = {x.untyped_storage().data_ptr() for x in leaves}
    assert set(saved_addresses(conv_glu, leaves)) <= addresses


@pytest.mark.slow
def test_it_is_one_graph_to_the_compiler():
    leaves = [x.requires_grad_() for x in inputs((1, 5, 3, 20))]
    check_one_graph(conv_glu, leaves)


def test_flops_are_counted():
    leaves = [x.requires_grad_() for x in inputs((1, 5, 3, 20))]
    with force("triton"), FlopCounterMode(display=False) as counter:
        conv_glu(*leaves).sum().backward()
    pixels = 5 * 3 * 20
    assert counter.get_total_flops() == 4 * 2 * 9 * pixels + 3 * 2 * 6 * pixels


def test_a_form_is_chosen_by_device_and_dtype():
    assert choose("conv_glu", device="cuda", dtype=torch.bfloat16) == "triton"
    assert choose("conv_glu", device="cuda", dtype=torch.float64) == "eager"
    assert choose("conv_glu", device="cpu", dtype=torch.float32) == "eager"
    assert choose("no such operator", device="cuda", dtype=torch.float32) == "eager"
