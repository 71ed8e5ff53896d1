"""The log-spaced continuous position bias of TransNeXt (arXiv 2311.17132).

Invariant: it depends on a block's weights and the stage's geometry alone, never on the images.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from .geometry import Geometry
from .kernels import pair_perceptron
from .kernels.eager import full_precision, widen


class PositionBias(nn.Module):
    """Mixin of both attentions: the log-spaced continuous position bias, `cpb_fc1` and `cpb_fc2`.

    The two-layer perceptron runs once on every distinct pair of offsets, in float32.
    """

    cpb_fc1: nn.Linear
    cpb_fc2: nn.Linear

    def position_bias(self, geometry: Geometry) -> Tensor:
        """The bias [h, N, M] added to the logits."""
        weight, hidden_bias = widen(self.cpb_fc1.weight), widen(self.cpb_fc1.bias)
        with full_precision(weight):
            rows, columns = geometry.features(weight.dtype)
            # A linear layer on (row, column) pairs is a sum of one term per axis.
            row_term = rows[:, None] * weight[:, 0]
            column_term = columns[:, None] * weight[:, 1] + hidden_bias
            table = pair_perceptron(row_term, column_term, widen(self.cpb_fc2.weight))
            table = table + widen(self.cpb_fc2.bias)
            bias = F.embedding(geometry.pairs, table.flatten(0, 1)).t()
            return _fit(bias, geometry)


def _fit(bias: Tensor, geometry: Geometry) -> Tensor:
    """[h, N·M] over the bias grids as [h, N, M] over the true ones, interpolated if they differ."""
    plan, num_heads = geometry.plan, bias.shape[0]
    num_queries, num_keys = math.prod(plan.grid), math.prod(plan.pool)
    if (plan.bias_grid, plan.bias_pool) == (plan.grid, plan.pool):
        return bias.reshape(num_heads, num_queries, num_keys)
    bias = bias.reshape(-1, 1, *plan.bias_pool)
    bias = F.interpolate(bias, plan.pool, mode="bilinear")
    bias = bias.reshape(num_heads, *plan.bias_grid, num_keys).permute(0, 3, 1, 2)
    bias = F.interpolate(bias, plan.grid, mode="bilinear")
    return bias.permute(0, 2, 3, 1).reshape(num_heads, num_queries, num_keys)
