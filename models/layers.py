"""Layers both families share.

Invariant: no layer draws random numbers; drop path is a function of noise handed to it.
"""

from torch import Tensor


def drop_path(x: Tensor, noise: Tensor | None, rate: float) -> Tensor:
    """Zero a residual branch per sample and scale the survivors (stochastic depth, 1603.09382).

    x [B, ...]; noise [B], uniform in [0, 1), drops the samples where it is below `rate`, the
    others are divided by 1 - rate. Without noise, or at rate 0, `x` is returned unchanged.
    """
    if noise is None or rate == 0:
        return x
    scale = (noise >= rate).to(x.dtype) / (1 - rate)
    return x * scale.view(-1, *[1] * (x.dim() - 1))
