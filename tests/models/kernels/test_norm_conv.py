"""The kernels of MS-FFN's normalised convolutions, in the interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import gelu_norm_conv
from models.kernels.choice import force
from models.kernels.triton_norm_conv import (
    activated_gradient,
    mixed_conv,
    mixed_conv_gradients,
)
from tests.models.kernels.interpreter import (
    DTYPES,
    check,
    check_one_graph,
    counted_traffic,
    saved_addresses,
)

# A map, and the number of channels with kernels of each side: a row of pixels, borders within a
# strip, several blocks of channels, no kernels of one side.
CASES = [((2, 1, 3, 7), (4, 1, 1, 1)), ((1, 8, 2, 40), (4, 33, 1, 2)), ((2, 5, 3, 8), (3, 2, 0, 3))]


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(shape, widths):
    weights = [
        randn(5 + side, width, 1, side, side)
        for width, side in zip(widths, (1, 3, 5, 7), strict=True)
        if width
    ]
    line = [randn(seed, shape[-1]) for seed in (2, 3, 4)]
    return [randn(1, *shape), *line, *weights]


def conv(x, gain, shift, bias, *weights):
    return gelu_norm_conv(x, gain, shift, list(weights), bias, eps=1e-5, group=None)[0]


def widened_conv(x, *parameters):
    return conv(x, *(p.to(torch.promote_types(x.dtype, torch.float32)) for p in parameters))


@pytest.mark.parametrize(
    ("case", "dtype"), [(0, DTYPES[0]), (2, DTYPES[0]), *((1, dtype) for dtype in DTYPES)], ids=str
)
def test_value_and_gradients(case, dtype):
    check(widened_conv, inputs(*CASES[case]), dtype)


def test_statistics_are_the_definitions():
    x, gain, shift, bias, *weights = inputs(*CASES[1])
    results = []
    for form in ("eager", "triton"):
        with force(form):
            results.append(gelu_norm_conv(x, gain, shift, weights, bias, eps=1e-5, group=None))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_kernels_in_another_order_are_left_to_the_definition():
    x, gain, shift, bias, *weights = inputs(*CASES[0])
    leaves = [gain, shift, torch.cat([bias[-1:], bias[:-1]]), weights[-1], *weights[:-1]]
    with force("triton"):
        found = conv(x, *leaves)
    torch.testing.assert_close(found, conv(x, *leaves))


def test_little_is_moved_twice():
    """Of the maps of stage 3 at 224 pixels in bfloat16, narrowed.

    Kernels and statistics count once: they do not depend on the batch, and stay in the cache.
    """
    x, ends = randn(1, 1, 14, 3, 4).bfloat16(), [1, 2, 3]
    line, weight = randn(2, 3, 4), randn(3, 7, 7, 4)
    map_bytes, table_bytes = x.numel() * 2, 4 * (1 + 9 + 25 + 49 + 4 * 4)
    with counted_traffic() as forward:
        mixed_conv(x, line, weight, line[0], ends)
    with counted_traffic() as backward:
        grad, *_ = mixed_conv_gradients(x, x, line, weight, ends)
        activated_gradient(grad, x, line)
    # Forward, two strips read the tables.
    assert forward.total - 2 * table_bytes <= 1.3 * 2 * map_bytes
    # Backward, one program sums up over the map, and there would be more pixels to one.
    tables = table_bytes + 52 * 4 * 4 + 3 * 3 * 4 * 4
    assert backward.total - tables <= 1.6 * 5 * map_bytes


def test_its_operators_are_sound():
    x, line, weight, ends = randn(1, 1, 2, 1, 4), randn(2, 3, 4), randn(3, 7, 7, 4), [1, 2, 3]
    torch.library.opcheck(mixed_conv, (x, line, weight, line[0], ends))
    torch.library.opcheck(mixed_conv_gradients, (x, x, line, weight, ends))
    torch.library.opcheck(activated_gradient, (x, x, line))


def test_it_saves_its_inputs_and_the_statistics():
    leaves = [x.requires_grad_() for x in inputs((1, 4, 4, 8), (2, 2, 2, 2))]
    saved = saved_addresses(conv, leaves)
    inputs_saved = {x.untyped_storage().data_ptr() for x in leaves} & set(saved)
    assert leaves[0].untyped_storage().data_ptr() in inputs_saved
    # Mean, variance and the number of values.
    assert len(set(saved) - inputs_saved) == 3


@pytest.mark.slow
def test_it_is_one_graph_to_the_compiler():
    leaves = [x.requires_grad_() for x in inputs((1, 5, 3, 8), (2, 2, 2, 2))]
    check_one_graph(conv, leaves)


def test_flops_are_counted():
    leaves = [x.requires_grad_() for x in inputs((1, 4, 4, 8), (2, 2, 2, 2))]
    with force("triton"), FlopCounterMode(display=False) as counter:
        conv(*leaves).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 16 * 2 * (1 + 9 + 25 + 49)
