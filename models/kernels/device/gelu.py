"""GELU and its derivative."""

import triton
import triton.language as tl


@triton.jit
def below(x):
    """The normal distribution: GELU is x times this."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def density(x):
    """Its density: GELU's derivative is the distribution, and x times this."""
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)
