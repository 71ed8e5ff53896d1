"""TransNeXt's aggregated attention on a GPU: one pass forward, and one and a bias's backward.

Shapes: B batch, H×W grid, N = H·W, C = h·d channels of h heads, M pooled tokens, S slots of a
window; maps are channels-last.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .choice import FASTER
from .device.aggregated_attention import (
    COLUMNS,
    aggregated_attention_gradients_kernel,
    aggregated_attention_kernel,
)
from .eager import LIBRARY
from .launch import launch

# Pooled tokens that fit into registers beside the rest; of more, so many are taken at a time.
MOST_POOLED = 64


class _AggregatedAttention(torch.autograd.Function):
    """Saves its inputs and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        out, log_sum = attend(*inputs)
        ctx.save_for_backward(*inputs, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(attend_gradients(grads[0], *ctx.saved_tensors))


@torch.library.custom_op(f"{LIBRARY}::aggregated_attention", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    query_embedding: Tensor,
    scale: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The mixed values [B, H, W, C], and the logarithm of each softmax's sum [B, h, N].

    q, k, v [B, H, W, C], pool_k and pool_v [B, M, C] in one dtype, all others float32:
    query_embedding [h, 1, d], scale [h, N, 1], tokens [h, d, S], token_bias and local_bias
    [h, 1, S], pool_bias [h, N, M].
    """
    maps = [x.contiguous() for x in (q, k, v, pool_k, pool_v)]
    tables = [x.contiguous() for x in (query_embedding, scale, local_bias, pool_bias)]
    out = torch.empty_like(maps[0])
    log_sum = scale.new_empty(len(q), len(scale), scale.shape[1])
    sizes = _sizes(q, pool_k, tokens)
    launch(
        aggregated_attention_kernel, _grid(q, tokens, seen=1),
        *maps, *tables, tokens.contiguous(), token_bias.contiguous(), out, log_sum,
        *_extents(q, pool_k, tokens), **sizes,
    )  # fmt: skip
    return out, log_sum


@torch.library.custom_op(f"{LIBRARY}::aggregated_attention_gradients", mutates_args=())
def attend_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    query_embedding: Tensor,
    scale: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    log_sum: Tensor,
) -> list[Tensor]:
    """The gradients of what `attend` takes."""
    maps = [x.contiguous() for x in (grad, q, k, v, pool_k, pool_v)]
    tables = [x.contiguous() for x in (query_embedding, scale, local_bias, pool_bias)]
    grad_maps = [torch.empty_like(maps[1]) for _ in range(3)]
    grad_scale, inner = torch.empty_like(log_sum), torch.empty_like(log_sum)
    heads, width, area = tokens.shape
    grid = _grid(q, tokens, seen=2)
    pool_sums = scale.new_empty(2, grid[0], *pool_k.shape)
    sums = scale.new_empty(grid[0], len(q), heads, width * area + 2 * area + width)
    launch(
        aggregated_attention_gradients_kernel, grid,
        *maps, *tables, tokens.contiguous(), token_bias.contiguous(), log_sum,
        *grad_maps, grad_scale, inner, pool_sums, sums,
        *_extents(q, pool_k, tokens), **_sizes(q, pool_k, tokens),
    )  # fmt: skip
    total = sums.sum(dim=(0, 1)).split([width * area, area, area, width], dim=1)
    return [*grad_maps]
