"""Kernels of the gated convolution.

A program owns the channels of a block in a strip of an image's rows. It walks along the strip and
keeps the columns that a convolution still needs in registers, one thread to a channel: what it
loads twice are the rows next to its strip. Everything is computed in float32. Maps [B, H, W, D]
are contiguous.
"""

import triton
import triton.language as tl

from .depthwise import load_column, nothing
from .gelu import below, density


@triton.jit
def gated_conv_kernel(
    gate,
    value,
    weight,
    bias,
    out,
    height,
    width,
    num_channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`GELU(conv(gate)) * value`."""
    strips = tl.cdiv(height, ROWS)
    image = (tl.program_id(0) // strips).to(tl.int64) * height * width * num_channels
    top = tl.program_id(0) % strips * ROWS
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < num_channels
    gate, value, out = gate + image + channels, value + image + channels, out + image + channels
    taps = _load_taps(weight, channels, inside)
    constant = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)

    left = nothing(ROWS + 2, BLOCK)
    here = load_column(gate, top - 1, 0, height, width, num_channels, inside, ROWS + 2)
    for column in range(width):
        right = load_column(
            gate, top - 1, column + 1, height, width, num_channels, inside, ROWS + 2
        )
        values = load_column(value, top, column, height, width, num_channels, inside, ROWS)
        for i in tl.static_range(ROWS):
            conv = constant + _convolve(left, here, right, taps, i)
            row = top + i
            place = (row * width + column) * num_channels
            tl.store(out + place, conv * below(conv) * values[i], mask=inside & (row < height))
        left = here
        here = right


@triton.jit
def gated_conv_gradients_kernel(
    grad,
    gate,
    value,
    weight,
    bias,
    out,
    grad_gate,
    grad_value,
    sums,
    height,
    width,
    num_channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything that follows from the gradient [B, H, W, D] of what `gated_conv_kernel` wrote.

    That is written again, as the linear layer after it needs it; `sums` [strips, 10, D] are parts
    of the gradients of the nine taps and of the bias. The gradient of the gate trails one column
    behind that of the convolution.
    """
    strips = tl.cdiv(height, ROWS)
    image = (tl.program_id(0) // strips).to(tl.int64) * height * width * num_channels
    top = tl.program_id(0) % strips * ROWS
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < num_channels
    grad, gate, value = grad + image + channels, gate + image + channels, value + image + channels
    out, grad_gate, grad_value = (
        out + image + channels,
        grad_gate + image + channels,
        grad_value + image + channels,
    )
    taps = _load_taps(weight, channels, inside)
    turned = _turned(taps)
    constant = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)

    left = nothing(ROWS + 4, BLOCK)
    here = load_column(gate, top - 2, 0, height, width, num_channels, inside, ROWS + 4)
    grad_left = nothing(ROWS + 2, BLOCK)
    grad_here = nothing(ROWS + 2, BLOCK)
    totals = nothing(10, BLOCK)
    for column in range(width + 1):
        right = load_column(
            gate, top - 2, column + 1, height, width, num_channels, inside, ROWS + 4
        )
        values = load_column(value, top - 1, column, height, width, num_channels, inside, ROWS + 2)
        grads = load_column(grad, top - 1, column, height, width, num_channels, inside, ROWS + 2)
        grad_right = ()
        for i in tl.static_range(ROWS + 2):
            conv = constant + _convolve(left, here, right, taps, i)
            share = below(conv)
            active = conv * share
            # Nothing flows from outside the map: there, grads are 0.
            grad_conv = grads[i] * values[i] * (share + conv * density(conv))
            grad_right = grad_right + (grad_conv,)
            if i > 0 and i <= ROWS:
                row = top + i - 1
                place = (row * width + column) * num_channels
                written = inside & (row < height) & (column < width)
                tl.store(out + place, active * values[i], mask=written)
                tl.store(grad_value + place, active * grads[i], mask=written)
                if row < height:
                    totals = _add_sums(totals, left, here, right, grad_conv, i)
        for i in tl.static_range(ROWS):
            row = top + i
            place = (row * width + column - 1) * num_channels
            total = _convolve(grad_left, grad_here, grad_right, turned, i)
            tl.store(grad_gate + place, total, mask=inside & (row < height) & (column > 0))
        left = here
        here = right
        grad_left = grad_here
        grad_here = grad_right
    for tap in tl.static_range(10):
        place = (tl.program_id(0) * 10 + tap) * num_channels + channels
        tl.store(sums + place, totals[tap], mask=inside)


@triton.jit
def _load_taps(weight, channels, inside):
    taps = ()
    for tap in tl.static_range(9):
        taps = taps + (tl.load(weight + channels * 9 + tap, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _convolve(left, here, right, taps, ROW: tl.constexpr):
    """The sum over the window whose first row is `ROW`."""
    total = left[ROW] * taps[0]
    total += here[ROW] * taps[1]
    total += right[ROW] * taps[2]
    for i in tl.static_range(1, 3):
        total += left[ROW + i] * taps[3 * i]
        total += here[ROW + i] * taps[3 * i + 1]
        total += right[ROW + i] * taps[3 * i + 2]
    return total


@triton.jit
def _turned(taps):
    """A kernel turned by half a turn."""
    turned = ()
    for tap in tl.static_range(9):
        turned = turned + (taps[8 - tap],)
    return turned


@triton.jit
def _add_sums(totals, left, here, right, grad, ROW: tl.constexpr):
    """Add one pixel's part to the gradients of the nine taps and the bias."""
    sums = ()
    for i in tl.static_range(3):
        sums = sums + (totals[3 * i] + grad * left[ROW + i],)
        sums = sums + (totals[3 * i + 1] + grad * here[ROW + i],)
        sums = sums + (totals[3 * i + 2] + grad * right[ROW + i],)
    return sums + (totals[9] + grad,)
