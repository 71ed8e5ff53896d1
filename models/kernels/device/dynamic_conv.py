"""Kernels of the depthwise convolution that has a kernel of its own for every sample."""

import triton
import triton.language as tl

from .depthwise import add_gradients, convolve, load_taps, nothing


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
    convolve(
        x + sample * height * width * pitch + channels,
        weight + sample * SIDE * SIDE * num_channels + channels,
        bias + sample * num_channels + channels,
        (),
        out + sample * height * width * num_channels + channels,
        top,
        channels < num_channels,
        height,
        width,
        num_channels,
        pitch,
        SIDE,
        SIDE,
        ROWS,
        False,
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
    taps = load_taps(
        weight + sample * SIDE * SIDE * num_channels + channels, num_channels, inside, SIDE, SIDE
    )
    totals = nothing(SIDE * SIDE + 1, BLOCK)
    for top in range(start, tl.minimum(start + ROWS * STRIPS, height), ROWS):
        totals = add_gradients(
            grad + sample * height * width * grad_pitch + channels,
            x + sample * height * width * pitch + channels,
            grad_x + sample * height * width * num_channels + channels,
            taps,
            (),
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
            False,
        )
    sums += tl.program_id(0).to(tl.int64) * (SIDE * SIDE + 1) * num_channels + channels
    for tap in tl.static_range(SIDE * SIDE + 1):
        tl.store(sums + tap * num_channels, totals[tap], mask=inside)
