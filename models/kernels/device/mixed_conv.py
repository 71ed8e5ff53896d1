"""Kernels of the depthwise convolution of a normalised GELU by kernels of four sizes.

Each size is for a part of the channels, and each program's channels are of one part. Maps
[B, H, W, C] are contiguous.
"""

import triton
import triton.language as tl

from .depthwise import add_gradients, convolve, load_line, load_taps, nothing
from .gelu import below, density


@triton.jit
def mixed_conv_kernel(
    x,
    line,
    weight,
    bias,
    out,
    height,
    width,
    num_channels,
    end_1,
    end_3,
    end_5,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Convolve a normalised GELU by kernels of four sizes, each of a part of the channels.

    line [3, C]: mean, scale and shift; weight [7, 7, C], zeros around smaller kernels; bias [C].
    Kernels of side 1, 3 and 5 end before the channels `end_1`, `end_3` and `end_5`.
    """
    side, start, end = _part(num_channels, end_1, end_3, end_5, BLOCK)
    strips = tl.cdiv(height, ROWS)
    image = (tl.program_id(0) // strips).to(tl.int64) * height * width * num_channels
    top = tl.program_id(0) % strips * ROWS
    channels = start + tl.arange(0, BLOCK)
    inside = channels < end
    x, weight, bias = x + image + channels, weight + channels, bias + channels
    line, out = load_line(line + channels, num_channels, inside), out + image + channels
    for half in tl.static_range(4):
        if side == 2 * half + 1:
            convolve(
                x,
                weight,
                bias,
                line,
                out,
                top,
                inside,
                height,
                width,
                num_channels,
                num_channels,
                2 * half + 1,
                7,
                ROWS,
                True,
            )


@triton.jit
def mixed_conv_gradients_kernel(
    grad,
    x,
    line,
    weight,
    grad_x,
    sums,
    height,
    width,
    num_channels,
    end_1,
    end_3,
    end_5,
    num_strips,
    STRIPS,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of what is convolved, and parts of sums over it.

    A program walks along `STRIPS` strips of one image after the other; sums [parts, 52, C] are the
    gradients of the 49 taps and of the bias, and the map's gradient, summed, and summed times GELU
    less its mean.
    """
    side, start, end = _part(num_channels, end_1, end_3, end_5, BLOCK)
    channels = start + tl.arange(0, BLOCK)
    inside = channels < end
    line = load_line(line + channels, num_channels, inside)
    grad, x, grad_x = grad + channels, x + channels, grad_x + channels
    sums += tl.program_id(0).to(tl.int64) * 52 * num_channels + channels
    for half in tl.static_range(4):
        if side == 2 * half + 1:
            _part_gradients(
                grad,
                x,
                line,
                weight + channels,
                grad_x,
                sums,
                inside,
                height,
                width,
                num_channels,
                num_strips,
                STRIPS,
                2 * half + 1,
                ROWS,
                BLOCK,
            )


@triton.jit
def activated_gradient_kernel(
    grad,
    x,
    line,
    grad_x,
    num_pixels,
    num_channels,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a map from that of a line on its GELU.

    line [3, C]: the scale of the gradient, the slope and the offset of what is added to it, a line
    on the GELU as well.
    """
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < num_channels
    scale, slope, offset = load_line(line + channels, num_channels, inside)
    place = pixels.to(tl.int64) * num_channels + channels[None, :]
    there = (pixels < num_pixels) & inside[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    flow = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
    share = below(value)
    flow = flow * scale[None, :] + value * share * slope[None, :] + offset[None, :]
    tl.store(grad_x + place, flow * (share + value * density(value)), mask=there)


@triton.jit
def _part(num_channels, end_1, end_3, end_5, BLOCK: tl.constexpr):
    """The side of a program's kernels, and where its channels start and those of the side end.

    The widest kernels come first, since they take the longest.
    """
    block = tl.program_id(1)
    side = 7
    start = end_5 + block * BLOCK
    end = num_channels
    if start >= end:
        block -= tl.cdiv(num_channels - end_5, BLOCK)
        side = 5
        start = end_3 + block * BLOCK
        end = end_5
        if start >= end:
            block -= tl.cdiv(end_5 - end_3, BLOCK)
            side = 3
            start = end_1 + block * BLOCK
            end = end_3
            if start >= end:
                block -= tl.cdiv(end_3 - end_1, BLOCK)
                side = 1
                start = block * BLOCK
                end = end_1
    return side, start, end


@triton.jit
def _part_gradients(
    grad,
    x,
    line,
    weight,
    grad_x,
    sums,
    inside,
    height,
    width,
    num_channels,
    num_strips,
    STRIPS,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    taps = load_taps(weight, num_channels, inside, SIDE, 7)
    totals = nothing(SIDE * SIDE + 3, BLOCK)
    first = tl.program_id(0) * STRIPS
    in_image = tl.cdiv(height, ROWS)
    for strip in range(first, tl.minimum(first + STRIPS, num_strips)):
        image = (strip // in_image).to(tl.int64) * height * width * num_channels
        totals = add_gradients(
            grad + image,
            x + image,
            grad_x + image,
            taps,
            line,
            totals,
            strip % in_image * ROWS,
            inside,
            height,
            width,
            num_channels,
            num_channels,
            num_channels,
            SIDE,
            ROWS,
            BLOCK,
            True,
        )
    for place in tl.static_range(49):
        total = tl.zeros((BLOCK,), tl.float32)
        if _inner(place, SIDE, 7) >= 0:
            total = totals[_inner(place, SIDE, 7)]
        tl.store(sums + place * num_channels, total, mask=inside)
    for i in tl.static_range(3):
        tl.store(sums + (49 + i) * num_channels, totals[SIDE * SIDE + i], mask=inside)


@triton.constexpr_function
def _inner(tap, side, widest):
    """A tap of a kernel, counted in the kernel of a smaller side in its middle; -1 outside that."""
    margin = (widest - side) // 2
    row, column = tap // widest - margin, tap % widest - margin
    there = 0 <= row < side and 0 <= column < side
    return row * side + column if there else -1
