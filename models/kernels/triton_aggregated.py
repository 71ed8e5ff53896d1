"""TransNeXt's aggregated attention on a GPU: no map of its weights is ever written.

Shapes: B batch, H×W grid, N = H·W, C = h·d channels of h heads, M pooled tokens, S places of a
window; maps are channels-last.
"""

from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .choice import FASTER
from .device.aggregated_attention import COLUMNS, aggregated_attention_kernel
from .device.aggregated_gradients import aggregated_attention_gradients_kernel
from .device.attention_gradients import attention_gradients_kernel
from .eager import LIBRARY, unit_backward
from .launch import launch
from .triton_attention import (
    KEY_GRADIENTS,
    Inputs,
    Sizes,
    blocks,
    options,
    padded,
    table_gradients,
)

# The most pooled tokens that registers hold beside the rest, and how many are taken at a time of
# more.
MOST_POOLED, SOME_POOLED = 64, 32
# The widest head, filled up to a tile, beside which they hold their gradients, too.
WIDEST = 32
FORWARD_WARPS, BACKWARD_WARPS = 4, 8


class _AggregatedAttention(torch.autograd.Function):
    """Saves its inputs and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        out: Tensor
        out, log_sum = aggregate(*inputs)
        ctx.save_for_backward(log_sum, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(aggregate_gradients(grads[0], *ctx.saved_tensors))


@torch.library.custom_op(f"{LIBRARY}::aggregate", mutates_args=())
def aggregate(
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
    parameters = query_embedding, scale, tokens, token_bias, local_bias, pool_bias
    out, log_sum = _shapes(q, k, v, pool_k, pool_v, *parameters)
    whole = pool_k.shape[1] <= MOST_POOLED
    launch(
        aggregated_attention_kernel, _grid(q, tokens, seen=1),
        *maps, *(x.contiguous() for x in parameters), out, log_sum, *_extents(q, pool_k, tokens),
        **_built_for(pool_k, tokens, whole), num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return out, log_sum


@torch.library.custom_op(f"{LIBRARY}::aggregate_gradients", mutates_args=())
def aggregate_gradients(
    grad: Tensor,
    log_sum: Tensor,
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
) -> list[Tensor]:
    """The gradients of what `aggregate` takes."""
    grad, q, k, v, pool_k, pool_v = (x.contiguous() for x in (grad, q, k, v, pool_k, pool_v))
    learned = [x.contiguous() for x in (query_embedding, scale, tokens, token_bias)]
    biases = local_bias.contiguous(), pool_bias.contiguous()
    grad_maps = [torch.empty_like(x) for x in (q, k, v)]
    grad_scale, inner = torch.empty_like(log_sum), torch.empty_like(log_sum)
    heads, width, area = tokens.shape
    grid = _grid(q, tokens, seen=2)
    # In float32, and of wide heads, there are no registers for their gradients.
    whole = pool_k.shape[1] <= MOST_POOLED and q.element_size() == 2 and width <= WIDEST
    sizes = [width * area, area, area, width]
    sums = scale.new_empty(grid[0], len(q), heads, sum(sizes))
    pool_sums = scale.new_empty(2, grid[0], *pool_k.shape) if whole else None
    launch(
        aggregated_attention_gradients_kernel, grid,
        grad, q, k, v, pool_k, pool_v, *learned, *biases, log_sum, *grad_maps, grad_scale, inner,
        pool_sums, sums, *_extents(q, pool_k, tokens),
        **_built_for(pool_k, tokens, whole), num_warps=BACKWARD_WARPS, maxnreg=255,
    )  # fmt: skip

    far = Inputs(grad, q, pool_k, pool_v, biases[1], learned[0], learned[1], log_sum)
    counts = Sizes(scale.shape[1], pool_k.shape[1], q.shape[-1], q.shape[-1])
    if pool_sums is None:
        grad_pools = _pool_gradients(far, inner, counts)
    else:
        grad_pool_k, grad_pool_v = pool_sums.sum(dim=1)
        by_head = *pool_k.shape[:2], heads, width
        grad_pool_k = unit_backward(pool_k.view(by_head), grad_pool_k.view(by_head)).flatten(2)
        grad_pools = [grad_pool_k.to(q.dtype), grad_pool_v.to(q.dtype)]
    grad_tokens, grad_token_bias, grad_local_bias, grad_embedding = (
        part.sum(dim=(0, 1)) for part in torch.split(sums, sizes, dim=-1)
    )
    return [
        *grad_maps,
        *grad_pools,
        grad_embedding.reshape(query_embedding.shape),
        grad_scale.sum(dim=0).view(scale.shape),
        grad_tokens.reshape(tokens.shape),
        grad_token_bias.reshape(token_bias.shape),
        grad_local_bias.reshape(local_bias.shape),
        table_gradients(far, inner, counts).sum(dim=0),
    ]


def _pool_gradients(far: Inputs, inner: Tensor, sizes: Sizes) -> list[Tensor]:
    """The gradients of pooled keys and values, by a pass over queries of its own."""
    batch, heads, _ = far.lse.shape
    grads = [torch.empty_like(x) for x in (far.k, far.v)]
    chosen = options(KEY_GRADIENTS, far.q, far.table, sizes)
    parts = blocks(sizes.num_keys, chosen["BLOCK_M"])
    # The kernel adds up what keys say of the embedding; queries have said all of it.
    unused = inner.new_empty(batch * parts, heads, far.q.shape[-1] // heads)
    launch(
        attention_gradients_kernel, (parts, heads, batch),
        *far, inner, None, *grads, None, unused, None, batch, 1, *sizes,
        COSINE=True, STEPS=0, **chosen,
    )  # fmt: skip
    return grads


@aggregate.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    scale = rest[3]
    return q.new_empty(q.shape), scale.new_empty(len(q), *scale.shape[:2])


@aggregate_gradients.register_fake
def _gradient_shapes(grad: Tensor, log_sum: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


@register_flop_formula(getattr(torch.ops, LIBRARY).aggregate)
def _flops(q: torch.Size, k: Any, v: Any, pool_k: torch.Size, *rest: Any, **_: Any) -> int:
    """Logits, and the mixing of values, and the window's products with the learned tokens."""
    window, pooled = _products(q, pool_k, rest)
    return 3 * window + 2 * pooled


@register_flop_formula(getattr(torch.ops, LIBRARY).aggregate_gradients)
def _gradient_flops(
    grad: Any, log_sum: Any, q: torch.Size, k: Any, v: Any, pool_k: torch.Size, *rest: Any, **_: Any
) -> int:
    """The logits again, and the gradients of both factors of both products, and of tokens."""
    window, pooled = _products(q, pool_k, rest)
    return 8 * window + 5 * pooled


def _products(q: torch.Size, pool_k: torch.Size, rest: tuple[Any, ...]) -> tuple[int, int]:
    """FLOPs of one product of all queries with their windows, and with the pooled tokens."""
    tokens = rest[3]
    return 2 * prod(q) * int(tokens[2]), 2 * prod(q) * int(pool_k[1])


def _grid(q: Tensor, tokens: Tensor, *, seen: int) -> tuple[int, int, int]:
    """Strips of columns, of which a window's reach, so many times, is only seen on either side."""
    own = COLUMNS.value - 2 * seen * (isqrt(tokens.shape[2]) // 2)
    return blocks(q.shape[2], own), len(tokens), len(q)


def _extents(q: Tensor, pool_k: Tensor, tokens: Tensor) -> tuple[int, ...]:
    return *q.shape[1:3], len(tokens), pool_k.shape[1]


def _built_for(pool_k: Tensor, tokens: Tensor, whole: bool) -> dict[str, Any]:
    _, width, area = tokens.shape
    pooled = padded(pool_k.shape[1]) if whole else SOME_POOLED
    return {
        "HEAD": width,
        "WIDE": max(WIDEST, padded(width)),
        "WINDOW": isqrt(area),
        "SLOTS": padded(area),
        "POOLED": pooled,
        "WHOLE": whole,
        "num_stages": 1,
    }


FASTER["aggregated_attention"] = _AggregatedAttention
