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

# Up to this many tokens all pairs at once, by matrix products, beat nine passes over the map.
SMALL_GRID = 64


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not touch what is computed on `x`'s device."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def aggregated_attention(
    q: Tensor,
    kv: Tensor,
    kv_pool: Tensor,
    *,
    query_embedding: Tensor,
    temperature: Tensor,
    key_count: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    tokens: Tensor,
    token_bias: Tensor,
) -> Tensor:
    """Attention over the 3x3 window around each query and a pooled view of the whole image.

    TransNeXt (arXiv 2311.17132), aggregated attention: cosine logits scaled by a learned
    temperature and the log of the number of visible keys, one softmax over both paths, and
    learned tokens added to the window's weights after it.

    q [B, H, W, C], kv [B, H, W, 2C] (keys, then values), kv_pool [B, M, 2C];
    query_embedding [h, 1, d], temperature [h, 1, 1], key_count [N] (visible keys of each query),
    local_bias [h, N, 9] (-inf outside the image), pool_bias [h, N, M], tokens [h, d, 9],
    token_bias [h, 1, 9]. Returns [B, H, W, C] in q's dtype.
    """
    num_heads = query_embedding.shape[0]
    with full_precision(q):
        unit = F.normalize(widen(_split_heads(q.flatten(1, 2), num_heads)), dim=-1)
        scaled = _scale_queries(unit, query_embedding, temperature, key_count)
        keys, values = (_as_map(part, num_heads) for part in kv.chunk(2, dim=-1))
        pool_keys, pool_values = (_split_heads(p, num_heads) for p in kv_pool.chunk(2, dim=-1))
        grid_shape = keys.shape
        near = window_logits(scaled.view(grid_shape), F.normalize(widen(keys), dim=-1))
        far = scaled @ F.normalize(widen(pool_keys), dim=-1).transpose(-2, -1)
        logits = torch.cat([near.flatten(2, 3) + local_bias, far + pool_bias], dim=-1)
        weights = logits.softmax(dim=-1)
        near = weights[..., :9] + (unit @ widen(tokens) + widen(token_bias))
        near = near.view(*grid_shape[:4], 9).to(values.dtype)
        mixed = window_mix(near, values)
        mixed = mixed + (weights[..., 9:].to(values.dtype) @ pool_values).view(grid_shape)
    return mixed.permute(0, 2, 3, 1, 4).reshape(q.shape)


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
    with full_precision(qkv):
        queries, keys, values = (
            _split_heads(part.flatten(1, 2), num_heads) for part in qkv.chunk(3, dim=-1)
        )
        unit = F.normalize(widen(queries), dim=-1)
        scaled = _scale_queries(unit, query_embedding, temperature, key_count)
        logits = scaled @ F.normalize(widen(keys), dim=-1).transpose(-2, -1)
        mixed = (logits + bias).softmax(dim=-1).to(values.dtype) @ values
    return mixed.transpose(1, 2).reshape(*qkv.shape[:3], qkv.shape[3] // 3)


def relative_attention(q: Tensor, kv: Tensor, *, position: Tensor, num_heads: int) -> Tensor:
    """Scaled dot-product attention with an additive position table.

    q [B, H, W, C], kv [B, H', W', 2C] (keys, then values), position [h, N, M].
    Returns [B, H, W, C] in q's dtype.
    """
    with full_precision(q):
        keys, values = (_split_heads(p.flatten(1, 2), num_heads) for p in kv.chunk(2, dim=-1))
        queries = _split_heads(q.flatten(1, 2), num_heads)
        logits = (widen(queries) / math.sqrt(queries.shape[-1])) @ widen(keys).transpose(-2, -1)
        mixed = (logits + position).softmax(dim=-1).to(values.dtype) @ values
    return mixed.transpose(1, 2).reshape(q.shape)


def _as_map(x: Tensor, num_heads: int) -> Tensor:
    """A map [B, H, W, C] as a view [B, h, H, W, d]."""
    return x.view(*x.shape[:3], num_heads, -1).permute(0, 3, 1, 2, 4)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Tokens [B, N, C] as a view [B, h, N, d]."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _scale_queries(
    unit: Tensor, query_embedding: Tensor, temperature: Tensor, key_count: Tensor
) -> Tensor:
    """(q̂ + embedding) · softplus(temperature) · ln(key count), for unit queries [B, h, N, d]."""
    scale = F.softplus(widen(temperature))
    scale = scale * key_count.to(scale.dtype).log()[:, None]
    return (unit + widen(query_embedding)) * scale


def window_logits(q: Tensor, k: Tensor) -> Tensor:
    """Dot products of each query with the keys of its 3x3 window; 0 outside the image.

    q and k [B, h, H, W, d]. Returns [B, h, H, W, 9], slot 3a + b being row + a - 1, column + b - 1.
    """
    height, width = q.shape[2:4]
    if height * width <= SMALL_GRID:
        products = q.flatten(2, 3) @ k.flatten(2, 3).transpose(-2, -1)
        slots = _window_slots(height, width, like=q)
        return torch.einsum("bhqk,qks->bhqs", products, slots).view(*q.shape[:4], 9)
    logits: Tensor = _WindowLogits.apply(q, k)
    return logits


def window_mix(weights: Tensor, v: Tensor) -> Tensor:
    """Sum of the values of each 3x3 window, weighted; values outside the image are 0.

    weights [B, h, H, W, 9] in the slot order of `window_logits`, v [B, h, H, W, d].
    Returns [B, h, H, W, d].
    """
    height, width = v.shape[2:4]
    if height * width <= SMALL_GRID:
        slots = _window_slots(height, width, like=v)
        spread = torch.einsum("bhqs,qks->bhqk", weights.flatten(2, 3), slots)
        return (spread @ v.flatten(2, 3)).view(v.shape)
    mixed: Tensor = _WindowMix.apply(weights, v)
    return mixed


def _window_slots(height: int, width: int, *, like: Tensor) -> Tensor:
    """One-hot [N, N, 9]: whether key k is in slot s of query q's window."""
    by_axis = []
    for size in (height, width):
        places = torch.arange(size, device=like.device)
        offsets = places - places[:, None]
        by_axis.append(offsets[..., None] == torch.arange(-1, 2, device=like.device))
    rows, columns = by_axis
    slots = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return slots.reshape(height * width, height * width, 9).to(like.dtype)


class _WindowLogits(torch.autograd.Function):
    """Its gradients are window sums themselves, so no slice is ever padded back and added."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        return torch.stack([(q * near).sum(dim=-1) for near in _shifts(k)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        (grad,) = grads
        return window_mix(grad, k), window_mix(_seen_from_key(grad), q)


class _WindowMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(weights, v)
        slots = torch.split(weights, 1, dim=-1)
        shifts = _shifts(v)
        mixed = slots[0] * shifts[0]
        for slot, near in zip(slots[1:], shifts[1:], strict=True):
            mixed = mixed.addcmul_(slot, near)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        weights, v = ctx.saved_tensors
        (grad,) = grads
        return window_logits(grad, v), window_mix(_seen_from_key(weights), grad)


def _shifts(x: Tensor) -> list[Tensor]:
    """The nine neighbours of every pixel of `x` [B, h, H, W, d], as views of one padded copy."""
    height, width = x.shape[2:4]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    return [
        padded[:, :, row : row + height, column : column + width]
        for row in range(3)
        for column in range(3)
    ]


def _seen_from_key(weights: Tensor) -> Tensor:
    """Turn weights by (query, slot) into weights by (key, opposite slot), [B, h, H, W, 9] both."""
    shifts = _shifts(weights)
    return torch.stack([shifts[slot][..., 8 - slot] for slot in range(9)], dim=-1)
