"""Kernels of wide depthwise convolutions.

A program owns the channels of a block, one to a thread, in a strip of an image's rows, and walks
along it. Forward it keeps the sums of the columns that the convolution reaches from the one that it
loads, so that it loads each pixel once and never looks back; backward it keeps the columns of the
gradient that the convolution reaches, and each value of them serves both gradients. What it loads
twice are the rows next to its strip. Everything is computed in float32. Channels of a map are next
to each other and pixels `pitch` numbers apart; where no pitch is given, as many as there are
channels.
"""

import triton
import triton.language as tl


@triton.jit
def dynamic_conv_kernel(
    x,
    weight,
    bias,
    out,
    height,
    width,
    num_channels,
    pitch,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Convolve each sample by a kernel of its own: weight [B, SIDE, SIDE, C], bias [B, C]."""
    strips = tl.cdiv(height, ROWS)
    sample = (tl.program_id(0) // strips).to(tl.int64)
    top = tl.program_id(0) % strips * ROWS
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _convolve(
        x + sample * height * width * pitch + channels,
        weight + sample * SIDE * SIDE * num_channels + channels,
        bias + sample * num_channels + channels,
        out + sample * height * width * num_channels + channels,
        top,
        channels < num_channels,
        height,
        width,
        num_channels,
        pitch,
        SIDE,
        ROWS,
    )


@triton.jit
def dynamic_conv_gradients_kernel(
    grad,
    x,
    weight,
    grad_x,
    sums,
    height,
    width,
    num_channels,
    grad_pitch,
    pitch,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the map, and parts of the gradients of the kernels and the biases.

    A program walks along `STRIPS` strips of a sample, one after the other, and sums up over them:
    sums [B, parts, SIDE * SIDE + 1, C].
    """
    parts = tl.cdiv(height, ROWS * STRIPS)
    sample = (tl.program_id(0) // parts).to(tl.int64)
    start = tl.program_id(0) % parts * ROWS * STRIPS
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < num_channels
    taps = _load_taps(
        weight + sample * SIDE * SIDE * num_channels + channels, num_channels, inside, SIDE
    )
    totals = _nothing(SIDE * SIDE + 1, BLOCK)
    for top in range(start, tl.minimum(start + ROWS * STRIPS, height), ROWS):
        totals = _gradients(
            grad + sample * height * width * grad_pitch + channels,
            x + sample * height * width * pitch + channels,
            grad_x + sample * height * width * num_channels + channels,
            taps,
            totals,
            top,
            inside,
            height,
            width,
            num_channels,
            grad_pitch,
            pitch,
            SIDE,
            ROWS,
            BLOCK,
        )
    sums += tl.program_id(0).to(tl.int64) * (SIDE * SIDE + 1) * num_channels + channels
    for tap in tl.static_range(SIDE * SIDE + 1):
        tl.store(sums + tap * num_channels, totals[tap], mask=inside)


@triton.jit
def _convolve(
    x,
    weight,
    bias,
    out,
    top,
    inside,
    height,
    width,
    num_channels,
    pitch,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Convolve the strip whose first row is `top`; all pointers are a program's channels'."""
    REACH: tl.constexpr = SIDE // 2
    taps = _load_taps(weight, num_channels, inside, SIDE)
    constant = tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    # Of the columns from the furthest ahead that is reached to the furthest behind.
    sums = ()
    for _ in tl.static_range(SIDE * ROWS):
        sums = sums + (constant,)
    for column in range(width):
        pixels = _load_column(
            x, top - REACH, column, height, width, pitch, inside, ROWS + 2 * REACH
        )
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
def _gradients(
    grad,
    x,
    grad_x,
    taps,
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
):
    """Write the map's gradient in a strip, and add the strip to the sums of the parameters'."""
    REACH: tl.constexpr = SIDE // 2
    COUNT: tl.constexpr = ROWS + 2 * REACH
    window = _nothing(REACH * COUNT, BLOCK)
    for i in tl.static_range(REACH):
        ahead = _load_column(grad, top - REACH, i, height, width, grad_pitch, inside, COUNT)
        window = window + ahead
    for column in range(width):
        ahead = _load_column(
            grad, top - REACH, column + REACH, height, width, grad_pitch, inside, COUNT
        )
        window = window + ahead
        pixels = _load_column(x, top, column, height, width, pitch, inside, ROWS)
        for i in tl.static_range(ROWS):
            # What this pixel went into lies opposite to the tap that took it there.
            total = taps[0] * window[(SIDE - 1) * COUNT + SIDE - 1 + i]
            for tap in tl.static_range(1, SIDE * SIDE):
                total += (
                    taps[tap] * window[(SIDE - 1 - tap % SIDE) * COUNT + SIDE - 1 - tap // SIDE + i]
                )
            place = ((top + i) * width + column) * num_channels
            tl.store(grad_x + place, total, mask=inside & (top + i < height))
        added = ()
        for tap in tl.static_range(SIDE * SIDE):
            total = totals[tap]
            for i in tl.static_range(ROWS):
                total += (
                    pixels[i] * window[(SIDE - 1 - tap % SIDE) * COUNT + SIDE - 1 - tap // SIDE + i]
                )
            added = added + (total,)
        total = totals[SIDE * SIDE]
        for i in tl.static_range(ROWS):
            total += window[REACH * COUNT + REACH + i]
        totals = added + (total,)
        kept = ()
        for i in tl.static_range((SIDE - 1) * COUNT):
            kept = kept + (window[COUNT + i],)
        window = kept
    return totals


@triton.jit
def _nothing(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((BLOCK,), tl.float32),)
    return values


@triton.jit
def _load_taps(weight, num_channels, inside, SIDE: tl.constexpr):
    taps = ()
    for tap in tl.static_range(SIDE * SIDE):
        value = tl.load(weight + tap * num_channels, mask=inside, other=0.0)
        taps = taps + (value.to(tl.float32),)
    return taps


@triton.jit
def _load_column(start, top, column, height, width, pitch, inside, COUNT: tl.constexpr):
    """`COUNT` pixels of a column from row `top` on; 0 outside the map."""
    values = ()
    for i in tl.static_range(COUNT):
        row = top + i
        there = (row >= 0) & (row < height) & (column < width)
        pixel = tl.load(start + (row * width + column) * pitch, mask=inside & there, other=0.0)
        values = values + (pixel.to(tl.float32),)
    return values
