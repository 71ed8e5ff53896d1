"""The kernels of wide depthwise convolutions, in the interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import dynamic_conv
from models.kernels.choice import force
from models.kernels.triton_dynamic_conv import convolve_each, convolve_each_gradients
from tests.models.kernels.interpreter import (
    DTYPES,
    check,
    check_one_graph,
    counted_traffic,
    saved_addresses,
)

# One pixel, one row, borders within a strip, several strips and parts, several blocks of channels.
SHAPES = [(1, 1, 1, 5), (2, 1, 4, 16), (1, 19, 2, 20), (1, 5, 3, 36)]


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(shape, side=7):
    batch, *_, channels = shape
    return [randn(1, *shape), randn(2, batch, side, side, channels), randn(3, batch, channels)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, dtype):
    check(dynamic_conv, inputs(shape), dtype)


@pytest.mark.parametrize("side", [1, 3])
def test_kernels_of_another_size(side):
    check(dynamic_conv, inputs((2, 5, 3, 8), side), torch.float32)


def test_some_channels_of_a_map_are_read_where_they_are():
    whole, weight, bias = randn(1, 2, 5, 3, 16), *inputs((2, 5, 3, 8))[1:]

    def half(whole, weight, bias):
        return dynamic_conv(whole.chunk(2, dim=-1)[1], weight, bias)

    check(half, [whole, weight, bias], torch.float32)
    part = whole.chunk(2, dim=-1)[1]
    with counted_traffic() as forward:
        convolve_each(part, weight, bias)
    assert forward.total == (2 * part.numel() + weight.numel() + bias.numel()) * 4


def test_little_is_moved_twice():
    """Of the maps of stage 3 at 224 pixels in bfloat16, narrowed."""
    x, weight, bias = (tensor.bfloat16() for tensor in inputs((1, 14, 14, 4)))
    map_bytes, weight_bytes = x.numel() * 2, weight.numel() * 2
    with counted_traffic() as forward:
        convolve_each(x, weight, bias)
    with counted_traffic() as backward:
        convolve_each_gradients(x, x, weight)
    assert forward.total <= 1.3 * (2 * map_bytes + weight_bytes)
    assert backward.total <= 1.6 * (3 * map_bytes + 2 * weight_bytes)


def test_little_of_a_high_map_is_moved_twice():
    """Of the maps of stage 1 at 224 pixels, narrowed so far that kernels would count too much."""
    x, weight, bias = inputs((1, 56, 2, 4))
    map_bytes, weight_bytes = x.numel() * 4, weight.numel() * 4
    with counted_traffic() as forward:
        convolve_each(x, weight, bias)
    with counted_traffic() as backward:
        convolve_each_gradients(x, x, weight)
    assert forward.total - 4 * weight_bytes <= 1.3 * 2 * map_bytes
    # Kernels are read, and their gradients written, by four programs.
    assert backward.total - 8.1 * weight_bytes <= 1.6 * 3 * map_bytes


def test_its_operators_are_sound():
    x, weight, bias = inputs((1, 5, 3, 20))
    torch.library.opcheck(convolve_each, (x, weight, bias))
    torch.library.opcheck(convolve_each_gradients, (x, x, weight))


def test_it_saves_its_inputs_alone():
    leaves = [x.requires_grad_() for x in inputs((1, 3, 2, 8))]
    addresses = {x.untyped_storage().data_ptr() for x in leaves}
    assert set(saved_addresses(dynamic_conv, leaves)) <= addresses


@pytest.mark.slow
def test_it_is_one_graph_to_the_compiler():
    leaves = [x.requires_grad_() for x in inputs((1, 5, 3, 20))]
    check_one_graph(dynamic_conv, leaves)


def test_flops_are_counted():
    leaves = [x.requires_grad_() for x in inputs((1, 5, 3, 20))]
    with force("triton"), FlopCounterMode(display=False) as counter:
        dynamic_conv(*leaves).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 49 * 5 * 3 * 20
