"""The definition of every operator, in plain PyTorch; any faster form is judged by it.

Invariant: normalisation, logits and softmax are computed in float32 (float64 for float64 inputs)
whatever the input dtype and autocast say. Shapes: B batch, N = H·W tokens, M pooled tokens,
h heads, d head width, C = h·d.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import exporting, faster
from .exported import pooled_by_products

# Up to this many tokens all pairs at once, by matrix products, beat nine passes over the map.
SMALL_GRID = 64

# Where operators of the compiler are named. Exported copies of this file may be imported beside it:
# each has a place of its own.
LIBRARY = __name__.replace(".", "_")


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not touch what is computed on `x`'s device."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or the dtype of `x` if it is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is wider."""
    return x.to(wide_dtype(x))


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    *,
    query_embedding: Tensor,
    temperature: Tensor,
    key_count: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
    outside: Tensor,
) -> Tensor:
    """Attention over the window around each query and a pooled view of the whole image.

    TransNeXt (arXiv 2311.17132), aggregated attention: cosine logits scaled by a learned
    temperature and the log of the number of visible keys, one softmax over both paths, and
    learned tokens added to the window's weights after it. Saves its inputs and the softmax.

    q, k, v [B, H, W, C], pool_k, pool_v [B, M, C]; of a window of S slots (9 in 3x3):
    query_embedding [h, 1, d], temperature [h, 1, 1], key_count [N] (visible keys of each query),
    local_bias [h, 1, S], pool_bias [h, N, M], tokens [h, d, S], token_bias [h, 1, S],
    outside [N, S] (bool: slots beyond the image). Returns [B, H, W, C] in q's dtype.
    """
    fused = faster("aggregated_attention", q)
    with full_precision(q):
        scale = query_scale(temperature, key_count)
        parameters = (widen(query_embedding), scale, widen(tokens), widen(token_bias))
        biases = widen(local_bias), widen(pool_bias)
        if fused is not None:
            out: Tensor = fused.apply(q, k, v, pool_k, pool_v, *parameters, *biases)
            return out
        biases = biases[0].masked_fill(outside, -math.inf), biases[1]
        mixed: Tensor = _AggregatedAttention.apply(q, k, v, pool_k, pool_v, *parameters, *biases)
    return mixed


def cosine_attention(
    qkv: Tensor,
    *,
    query_embedding: Tensor,
    temperature: Tensor,
    key_count: Tensor,
    bias: Tensor,
) -> Tensor:
    """Global attention with the cosine logits of `aggregated_attention`.

    qkv [B, H, W, 3C] (queries, keys, values), query_embedding [h, 1, d], temperature [h, 1, 1],
    key_count [N], bias [h, N, N]. Returns [B, H, W, C] in qkv's dtype.
    """
    num_heads = query_embedding.shape[0]
    fused = faster("cosine_attention", qkv)
    with full_precision(qkv):
        embedding, scale = widen(query_embedding), query_scale(temperature, key_count)
        if fused is not None:
            out: Tensor = fused.apply(qkv, widen(bias), embedding, scale)
            return out
        queries, keys, values = (
            _split_heads(part.flatten(1, 2), num_heads) for part in qkv.chunk(3, dim=-1)
        )
        logits = (_unit(queries) + embedding) * scale @ _unit(keys).transpose(-2, -1)
        mixed = (logits + bias).softmax(dim=-1).to(values.dtype) @ values
    return mixed.transpose(1, 2).reshape(*qkv.shape[:3], qkv.shape[3] // 3)


def relative_attention(q: Tensor, kv: Tensor, *, position: Tensor, num_heads: int) -> Tensor:
    """Scaled dot-product attention with an additive position table.

    q [B, H, W, C], kv [B, H', W', 2C] (keys, then values), position [h, N, M].
    Returns [B, H, W, C] in q's dtype.
    """
    fused = faster("relative_attention", q)
    with full_precision(q):
        if fused is not None:
            out: Tensor = fused.apply(q, kv, widen(position))
            return out
        keys, values = (_split_heads(p.flatten(1, 2), num_heads) for p in kv.chunk(2, dim=-1))
        queries = _split_heads(q.flatten(1, 2), num_heads)
        logits = (widen(queries) / math.sqrt(queries.shape[-1])) @ widen(keys).transpose(-2, -1)
        mixed = logits.add_(position).softmax(dim=-1).to(values.dtype) @ values
    return mixed.transpose(1, 2).reshape(q.shape)


def adaptive_pool(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling, [B, H, W, C] -> [B, *grid, C]."""
    if exporting():
        return pooled_by_products(x, grid)
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


def pooled_gelu(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """GELU, then adaptive average pooling: [B, H, W, C] -> [B, *grid, C]; saves `x` alone."""
    pooled: Tensor = _PooledGELU.apply(x, grid)
    return pooled


class _PooledGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x)
        return adaptive_pool(F.gelu(x), grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        spread = torch.ops.aten._adaptive_avg_pool2d_backward(
            grads[0].permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
        )
        return torch.ops.aten.gelu_backward(spread.permute(0, 2, 3, 1), x), None


def pair_perceptron(rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """The output layer of a perceptron whose hidden units add a row's and a column's term.

    rows [R, E], columns [S, E], weight [h, E]. Returns ReLU(row + column) · weight [R, S, h]. The
    hidden units, far more than all the rest, are computed again in the backward pass.
    """
    table: Tensor = _PairPerceptron.apply(rows, columns, weight)
    return table


class _PairPerceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns, weight)
        table: Tensor = F.linear((rows[:, None] + columns).relu_(), weight)
        return table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        rows, columns, weight = ctx.saved_tensors
        (grad,) = grads
        hidden = (rows[:, None] + columns).relu_()
        grad_weight = grad.flatten(0, 1).t() @ hidden.flatten(0, 1)
        grad_hidden = torch.ops.aten.threshold_backward(grad @ weight, hidden, 0)
        return grad_hidden.sum(dim=1), grad_hidden.sum(dim=0), grad_weight


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Tokens [B, N, C] as a view [B, h, N, d]."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def query_scale(temperature: Tensor, key_count: Tensor) -> Tensor:
    """softplus(temperature) · ln(key count) [h, N, 1], what queries are multiplied by."""
    scale = F.softplus(widen(temperature))
    return scale * key_count.to(scale.dtype).log()[:, None]


def window_logits(q: Tensor, k: Tensor, side: int) -> Tensor:
    """Dot products of each query with the keys of its window; 0 outside the image.

    q and k [B, h, H, W, d]. Returns [B, h, H, W, side²], slot side·a + b being row + a - side // 2,
    column + b - side // 2.
    """
    height, width = q.shape[2:4]
    if _is_small(height, width):
        products = q.flatten(2, 3) @ k.flatten(2, 3).transpose(-2, -1)
        slots = _window_slots(height, width, side, like=q)
        return torch.einsum("bhqk,qks->bhqs", products, slots).view(*q.shape[:4], side**2)
    return torch.stack([(q * near).sum(dim=-1) for near in _shifts(k, side)], dim=-1)


def window_mix(weights: Tensor, v: Tensor) -> Tensor:
    """Sum of the values of each window, weighted; values outside the image are 0.

    weights [B, h, H, W, side²] in the slot order of `window_logits`, v [B, h, H, W, d].
    Returns [B, h, H, W, d].
    """
    height, width = v.shape[2:4]
    side = _side(weights)
    if _is_small(height, width):
        slots = _window_slots(height, width, side, like=v)
        spread = torch.einsum("bhqs,qks->bhqk", weights.flatten(2, 3), slots)
        return (spread @ v.flatten(2, 3)).view(v.shape)
    first, *others = zip(torch.split(weights, 1, dim=-1), _shifts(v, side), strict=True)
    mixed = first[0] * first[1]
    for slot, near in others:
        mixed = mixed.addcmul_(slot, near)
    return mixed


def _is_small(height: int, width: int) -> bool:
    return not exporting() and height * width <= SMALL_GRID


def _side(slots: Tensor) -> int:
    """The side of windows whose slots are the last dimension."""
    return math.isqrt(slots.shape[-1])


def _window_slots(height: int, width: int, side: int, *, like: Tensor) -> Tensor:
    """One-hot [N, N, side²]: whether key k is in slot s of query q's window."""
    reach, by_axis = side // 2, []
    for size in (height, width):
        places = torch.arange(size, device=like.device)
        offsets = places - places[:, None]
        by_axis.append(offsets[..., None] == torch.arange(-reach, reach + 1, device=like.device))
    rows, columns = by_axis
    slots = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return slots.reshape(height * width, height * width, side**2).to(like.dtype)


class _AggregatedAttention(torch.autograd.Function):
    """Gradients of window sums are window sums, so no slice is ever padded back and added.

    Everything but the softmax is cheap next to keeping it, and computed again in the backward
    pass. Maps are split into heads [B, h, H, W, d] and so contiguous along a row.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        num_heads, slots = scale.shape[0], tokens.shape[-1]
        unit = _unit(_head_map(q, num_heads))
        queries = _scale(unit, query_embedding, scale)
        keys = _unit(_head_map(k, num_heads))
        near = window_logits(queries, keys, _side(tokens)).flatten(2, 3)
        pool_keys = _unit(_split_heads(pool_k, num_heads))
        far = queries.flatten(2, 3) @ pool_keys.transpose(-2, -1)
        weights = torch.cat([near.add_(local_bias), far.add_(pool_bias)], dim=-1).softmax(dim=-1)
        ctx.save_for_backward(
            q, k, v, pool_k, pool_v, query_embedding, scale, tokens, token_bias, weights
        )
        values = _head_map(v, num_heads)
        window = _window_weights(weights, unit, tokens, token_bias).to(values.dtype)
        mixed = window_mix(window, values).flatten(2, 3)
        mixed += weights[..., slots:].to(values.dtype) @ _split_heads(pool_v, num_heads)
        return mixed.transpose(1, 2).reshape(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pool_k, pool_v, query_embedding, scale, tokens, token_bias, weights = (
            ctx.saved_tensors
        )
        num_heads, slots = scale.shape[0], tokens.shape[-1]
        with full_precision(q):
            grad = widen(_head_map(grads[0], num_heads))
            values = widen(_head_map(v, num_heads))
            raw_queries, raw_keys = _head_map(q, num_heads), _head_map(k, num_heads)
            unit, keys = _unit(raw_queries), _unit(raw_keys)
            queries = _scale(unit, query_embedding, scale)
            raw_pool_keys = _split_heads(pool_k, num_heads)
            pool_keys = _unit(raw_pool_keys)
            pool_values = widen(_split_heads(pool_v, num_heads))

            window = _window_weights(weights, unit, tokens, token_bias)
            grad_values = window_mix(_seen_from_key(window), grad)
            grad_window = window_logits(grad, values, _side(tokens)).flatten(2, 3)
            grad_pool_values = weights[..., slots:].transpose(-2, -1) @ grad.flatten(2, 3)
            grad_far = grad.flatten(2, 3) @ pool_values.transpose(-2, -1)

            grad_logits = torch.cat([grad_window, grad_far], dim=-1).mul_(weights)
            grad_logits -= weights * grad_logits.sum(dim=-1, keepdim=True)
            near = grad_logits[..., :slots].view(window.shape)
            far = grad_logits[..., slots:]
            grad_keys = window_mix(_seen_from_key(near), queries)
            grad_pool_keys = far.transpose(-2, -1) @ queries.flatten(2, 3)
            grad_queries = window_mix(near, keys).flatten(2, 3)
            grad_queries += far @ pool_keys

            unit = unit.flatten(2, 3)
            grad_scale = (grad_queries * (unit + query_embedding)).sum(dim=(0, 3))
            grad_unit = grad_queries.mul_(scale)
            grad_embedding = grad_unit.sum(dim=(0, 2))
            grad_unit = grad_unit + grad_window @ tokens.transpose(-2, -1)
            grad_tokens = (unit.transpose(-2, -1) @ grad_window).sum(dim=0)
        return (
            _merge_heads(unit_backward(raw_queries.flatten(2, 3), grad_unit), q),
            _merge_heads(unit_backward(raw_keys, grad_keys).flatten(2, 3), k),
            _merge_heads(grad_values.flatten(2, 3), v),
            _merge_heads(unit_backward(raw_pool_keys, grad_pool_keys), pool_k),
            _merge_heads(grad_pool_values, pool_v),
            grad_embedding[:, None],
            grad_scale[..., None],
            grad_tokens,
            grad_window.sum(dim=(0, 2))[:, None],
            grad_logits[..., :slots].sum(dim=0),
            grad_logits[..., slots:].sum(dim=0),
        )


def _head_map(x: Tensor, num_heads: int) -> Tensor:
    """A map [B, H, W, C] copied to [B, h, H, W, d]."""
    return x.view(*x.shape[:3], num_heads, -1).permute(0, 3, 1, 2, 4).contiguous()


def _merge_heads(x: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, h, N, d] in the shape [B, ..., C] and dtype of `like`."""
    return x.transpose(1, 2).reshape(like.shape).to(like.dtype)


def _unit(x: Tensor) -> Tensor:
    """`x` at length one along its last dimension, at least in float32."""
    unit: Tensor = F.normalize(widen(x), dim=-1)
    return unit


def unit_backward(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `_unit` at `x`; a length below its floor of 1e-12 counts as constant."""
    x = widen(x)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / length.clamp_min(1e-12)
    along = (unit * grad).sum(dim=-1, keepdim=True) * (length > 1e-12)
    return (grad - unit * along) / length.clamp_min(1e-12)


def _scale(unit: Tensor, query_embedding: Tensor, scale: Tensor) -> Tensor:
    """(q̂ + embedding) · scale, for unit queries [B, h, H, W, d]."""
    return ((unit.flatten(2, 3) + query_embedding) * scale).view(unit.shape)


def _window_weights(weights: Tensor, unit: Tensor, tokens: Tensor, token_bias: Tensor) -> Tensor:
    """The weights of the window's values [B, h, H, W, S]: its softmax and the learned tokens."""
    window = unit.flatten(2, 3) @ tokens
    window += token_bias
    slots = tokens.shape[-1]
    window += weights[..., :slots]
    return window.view(*unit.shape[:4], slots)


def _shifts(x: Tensor, side: int) -> list[Tensor]:
    """The neighbours of every pixel of `x` [B, h, H, W, d], as views of one padded copy."""
    height, width = x.shape[2:4]
    padded = F.pad(x, (0, 0, *(side // 2,) * 4))
    return [
        padded[:, :, row : row + height, column : column + width]
        for row in range(side)
        for column in range(side)
    ]


def _seen_from_key(weights: Tensor) -> Tensor:
    """Turn weights by (query, slot) into weights by (key, opposite slot), [B, h, H, W, S] both."""
    shifts = _shifts(weights, _side(weights))
    return torch.stack([shift[..., -1 - slot] for slot, shift in enumerate(shifts)], dim=-1)
