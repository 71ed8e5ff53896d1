"""What kernels of wide depthwise convolutions do in a strip of an image's rows.

A program owns the channels of a block, one to a thread, and walks along the strip. Forward it keeps
the sums of the columns that the convolution reaches from the one that it loads, so that it loads
each pixel once and never looks back; backward it keeps the columns of the gradient that the
convolution reaches, and each value of them serves both gradients. What it loads twice are the rows
next to its strip. Everything is computed in float32. Channels of a map are next to each other, and
pixels `pitch` numbers apart where a pitch is given.

A map may be convolved as it is, or after GELU and a line: (GELU(x) - mean) * scale + shift.
"""

import triton
import triton.language as tl

from .gelu import below


@triton.jit
def convolve(
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
    pitch,
    SIDE: tl.constexpr,
    WIDEST: tl.constexpr,
    ROWS: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Convolve the strip whose first row is `top`; all pointers are a program's channels'."""
    REACH: tl.constexpr = SIDE // 2
    COUNT: tl.constexpr = ROWS + 2 * REACH
    taps = load_taps(weight, num_channels, inside, SIDE, WIDEST)
    constant = tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    # Of the columns from the furthest ahead that is reached to the furthest behind.
    sums = ()
    for _ in tl.static_range(SIDE * ROWS):
        sums = sums + (constant,)
    for column in range(width):
        pixels = load_column(x, top - REACH, column, height, width, pitch, inside, COUNT)
        if NORMED:
            centred = _activated(pixels, line[0], COUNT)
            pixels = _normalised(centred, line, top - REACH, height, COUNT)
        reached = ()
        for tap in tl.static_range(SIDE):
            for i in tl.static_range(ROWS):
                total = sums[tap * ROWS + i]
                for row in tl.static_range(SIDE):
                    total += taps[row * SIDE + tap] * pixels[i + row]
                reached = reached + (total,)
        done = column - REACH
        for i in tl.static_range(ROWS):
            place = ((top + i) * width + done) * num_channels
            written = inside & (done >= 0) & (top + i < height)
            tl.store(out + place, reached[(SIDE - 1) * ROWS + i], mask=written)
        sums = ()
        for _ in tl.static_range(ROWS):
            sums = sums + (constant,)
        for i in tl.static_range((SIDE - 1) * ROWS):
            sums = sums + (reached[i],)
    for behind in tl.static_range(1, REACH + 1):
        done = width - behind
        for i in tl.static_range(ROWS):
            place = ((top + i) * width + done) * num_channels
            written = inside & (done >= 0) & (top + i < height)
            tl.store(out + place, sums[(REACH + behind) * ROWS + i], mask=written)


@triton.jit
def add_gradients(
    grad,
    x,
    grad_x,
    taps,
    line,
    totals,
    top,
    inside,
    height,
    width,
    num_channels,
    grad_pitch,
    pitch,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Write the map's gradient in a strip, and add the strip to the sums of the parameters'."""
    REACH: tl.constexpr = SIDE // 2
    COUNT: tl.constexpr = ROWS + 2 * REACH
    window = nothing(REACH * COUNT, BLOCK)
    for i in tl.static_range(REACH):
        ahead = load_column(grad, top - REACH, i, height, width, grad_pitch, inside, COUNT)
        window = window + ahead
    for column in range(width):
        ahead = load_column(
            grad, top - REACH, column + REACH, height, width, grad_pitch, inside, COUNT
        )
        window = window + ahead
        pixels = load_column(x, top, column, height, width, pitch, inside, ROWS)
        if NORMED:
            centred = _activated(pixels, line[0], ROWS)
            pixels = _normalised(centred, line, top, height, ROWS)
        added = ()
        for tap in tl.static_range(SIDE * SIDE):
            total = totals[tap]
            for i in tl.static_range(ROWS):
                total += pixels[i] * window[_opposite(tap, i, SIDE, COUNT)]
            added = added + (total,)
        total = totals[SIDE * SIDE]
        for i in tl.static_range(ROWS):
            total += window[REACH * COUNT + REACH + i]
        added = added + (total,)
        if NORMED:
            into_shift = totals[SIDE * SIDE + 1]
            into_gain = totals[SIDE * SIDE + 2]
        for i in tl.static_range(ROWS):
            total = taps[0] * window[_opposite(0, i, SIDE, COUNT)]
            for tap in tl.static_range(1, SIDE * SIDE):
                total += taps[tap] * window[_opposite(tap, i, SIDE, COUNT)]
            place = ((top + i) * width + column) * num_channels
            tl.store(grad_x + place, total, mask=inside & (top + i < height))
            if NORMED:
                total = tl.where(top + i < height, total, 0.0)
                into_shift += total
                into_gain += total * centred[i]
        if NORMED:
            added = added + (into_shift, into_gain)
        totals = added
        kept = ()
        for i in tl.static_range((SIDE - 1) * COUNT):
            kept = kept + (window[COUNT + i],)
        window = kept
    return totals


@triton.constexpr_function
def _opposite(tap, row, side, count):
    """Where in a window is what went through a tap: opposite to where that took it from."""
    return (side - 1 - tap % side) * count + side - 1 - tap // side + row


@triton.jit
def nothing(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """`COUNT` sums to begin with."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((BLOCK,), tl.float32),)
    return values


@triton.jit
def load_taps(weight, num_channels, inside, SIDE: tl.constexpr, WIDEST: tl.constexpr):
    """The `SIDE` x `SIDE` taps in the middle of kernels [WIDEST, WIDEST, C]."""
    MARGIN: tl.constexpr = (WIDEST - SIDE) // 2
    taps = ()
    for tap in tl.static_range(SIDE * SIDE):
        place = (tap // SIDE + MARGIN) * WIDEST + tap % SIDE + MARGIN
        value = tl.load(weight + place * num_channels, mask=inside, other=0.0)
        taps = taps + (value.to(tl.float32),)
    return taps


@triton.jit
def load_line(line, num_channels, inside):
    """The three rows of a program's channels of `line` [3, C]."""
    mean = tl.load(line, mask=inside, other=0.0)
    scale = tl.load(line + num_channels, mask=inside, other=0.0)
    shift = tl.load(line + 2 * num_channels, mask=inside, other=0.0)
    return mean, scale, shift


@triton.jit
def load_column(start, top, column, height, width, pitch, inside, COUNT: tl.constexpr):
    """`COUNT` pixels of a column from row `top` on; 0 outside the map."""
    values = ()
    for i in tl.static_range(COUNT):
        there = inside & (top + i >= 0) & (top + i < height) & (column < width)
        place = ((top + i) * width + column) * pitch
        pixel = tl.load(start + place, mask=there, other=0.0)
        values = values + (pixel.to(tl.float32),)
    return values


@triton.jit
def _activated(pixels, mean, COUNT: tl.constexpr):
    """GELU of pixels, less its mean."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (pixels[i] * below(pixels[i]) - mean,)
    return values


@triton.jit
def _normalised(centred, line, top, height, COUNT: tl.constexpr):
    """Activated pixels normalised; 0 above and below the map."""
    values = ()
    for i in tl.static_range(COUNT):
        there = (top + i >= 0) & (top + i < height)
        values = values + (tl.where(there, centred[i] * line[1] + line[2], 0.0),)
    return values
