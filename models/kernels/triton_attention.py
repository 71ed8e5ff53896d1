"""Attention with a table of biases on a GPU: its weights are never written.

Shapes: B batch, H×W grid, N = H·W queries, M keys, h heads, d head width, C = h·d; maps are
channels-last. `maps` are queries, keys and values in one, [B, H, W, 3C], or queries [B, H, W, C]
and the keys and values [B, H', W', 2C]. Logits are scaled dot products, or, given an embedding
[h, 1, d] and a scale [h, N, 1], cosines; to both a table [h, N, M] is added.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .choice import FASTER
from .device.attention import attention_kernel
from .device.attention_gradients import (
    add_parts_kernel,
    attention_gradients_kernel,
    query_gradients_kernel,
    relative_gradients_kernel,
    table_gradients_kernel,
)
from .eager import LIBRARY
from .launch import launch

# The most keys whose gradients one program computes.
OWN_KEYS = 64
# Queries and keys of a block, and warps, that registers suffice for, by the bytes of a number; of
# heads wider than `NARROW`, filled up to a tile, there are fewer queries.
NARROW = 32
FORWARD = {2: (256, 32, 8), 4: (256, 16, 8)}
COSINE_FORWARD = {2: (256, 32, 8), 4: (128, 32, 8)}
QUERY_GRADIENTS = {2: (64, 32, 4), 4: (32, 32, 8)}
KEY_GRADIENTS = {2: (32, OWN_KEYS, 4), 4: (16, OWN_KEYS, 8)}
RELATIVE_GRADIENTS = {2: (128, OWN_KEYS, 8), 4: (16, OWN_KEYS, 8)}
TABLE_GRADIENTS = {2: (128, 32, 8), 4: (32, 32, 8)}
# The most queries for which the table's gradient stays in registers beside those of the keys; and
# where these are only parts, of some queries, which are added up later. There are fewer registers
# where the numbers of a head are not aligned, so that each is loaded by an address of its own.
FEW_QUERIES = 64
PART_QUERIES, UNALIGNED_PART_QUERIES = 384, 256
# Numbers that a program adds up.
SUMS = 1024
# Images are divided among programs until there are so many programs, but so few images for each:
# every program writes a part of the table's gradient.
PROGRAMS, IMAGES = 128, 8


class Sizes(NamedTuple):
    """Tokens of an image, and how many numbers apart they are."""

    num_queries: int
    num_keys: int
    q_stride: int
    kv_stride: int


class Inputs(NamedTuple):
    """What gradients are computed from: maps, parameters, and the softmax's denominators."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    embedding: Tensor | None
    scale: Tensor | None
    lse: Tensor


class _CosineAttention(torch.autograd.Function):
    """Saves its inputs, and the softmax's denominators."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, embedding: Tensor, scale: Tensor) -> Tensor:
        out: Tensor
        out, lse = attention([qkv], table, embedding, scale)
        ctx.save_for_backward(lse, qkv, table, embedding, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        lse, qkv, *parameters = ctx.saved_tensors
        return tuple(attention_gradients(grads[0], lse, [qkv], *parameters))


class _RelativeAttention(torch.autograd.Function):
    """Saves its inputs, and the softmax's denominators."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, table: Tensor) -> Tensor:
        out: Tensor
        out, lse = attention([q, kv], table, None, None)
        ctx.save_for_backward(lse, q, kv, table)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        lse, q, kv, table = ctx.saved_tensors
        return tuple(attention_gradients(grads[0], lse, [q, kv], table, None, None))


@torch.library.custom_op(f"{LIBRARY}::attention", mutates_args=())
def attention(
    maps: list[Tensor], table: Tensor, embedding: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mixed values [B, H, W, C], and the log of the softmax's denominators [B, h, N].

    The latter, table, embedding and scale are float32.
    """
    maps, sizes = [x.contiguous() for x in maps], _sizes(maps)
    out, lse = _attention_shapes(maps, table, embedding, scale)
    cosine = scale is not None
    tiles = COSINE_FORWARD if cosine else FORWARD
    chosen = options(tiles, _split(maps)[0], table, sizes)
    launch(
        attention_kernel, (blocks(sizes.num_queries, chosen["BLOCK_N"]), *lse.shape[1::-1]),
        *_split(maps), table.contiguous(), _contiguous(embedding), _contiguous(scale),
        out, lse, *sizes, COSINE=cosine, **chosen,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op(f"{LIBRARY}::attention_gradients", mutates_args=())
def attention_gradients(
    grad: Tensor,
    lse: Tensor,
    maps: list[Tensor],
    table: Tensor,
    embedding: Tensor | None,
    scale: Tensor | None,
) -> list[Tensor]:
    """The gradients of maps, table, and, where there are such, of embedding and scale."""
    grad, maps, sizes = grad.contiguous(), [x.contiguous() for x in maps], _sizes(maps)
    batch, num_heads, num_queries = lse.shape
    few = num_queries <= FEW_QUERIES
    if sizes.num_keys <= OWN_KEYS and not few and scale is None:
        return _relative_gradients(grad, lse, maps, table.contiguous(), sizes)

    grad_maps = [torch.empty_like(x) for x in maps]
    grad_q, grad_k, grad_v = _split(grad_maps)
    grad_scale, delta = torch.empty_like(lse), torch.empty_like(lse)
    parameters = table.contiguous(), _contiguous(embedding), _contiguous(scale)
    inputs = Inputs(grad, *_split(maps), *parameters, lse)
    whole, cosine = few and sizes.num_keys <= OWN_KEYS, scale is not None
    if not whole:
        chosen = options(QUERY_GRADIENTS, inputs.q, table, sizes)
        launch(
            query_gradients_kernel,
            (blocks(num_queries, chosen["BLOCK_N"]), num_heads, batch),
            *inputs, grad_q, grad_scale, delta, *sizes, COSINE=cosine, **chosen,
        )  # fmt: skip

    chosen = options(KEY_GRADIENTS, inputs.q, table, sizes)
    parts = blocks(sizes.num_keys, chosen["BLOCK_M"])
    groups = _groups(batch, num_heads) if whole else batch
    grad_table = table.new_empty(groups, *table.shape) if whole else None
    grad_embedding = table.new_empty(groups * parts, num_heads, grad.shape[-1] // num_heads)
    launch(
        attention_gradients_kernel, (parts, num_heads, groups),
        *inputs, delta, grad_q, grad_k, grad_v, grad_table, grad_embedding, grad_scale,
        batch, blocks(batch, groups), *sizes, COSINE=cosine,
        STEPS=blocks(num_queries, chosen["BLOCK_N"]) if whole else 0, **chosen,
    )  # fmt: skip

    if grad_table is None:
        grad_table = table_gradients(inputs, delta, sizes)
    found = [*grad_maps, grad_table.sum(dim=0)]
    if embedding is None or scale is None:
        return found
    grad_embedding = grad_embedding.sum(dim=0).view(embedding.shape)
    return [*found, grad_embedding, grad_scale.sum(dim=0).view(scale.shape)]


def _relative_gradients(
    grad: Tensor, lse: Tensor, maps: list[Tensor], table: Tensor, sizes: Sizes
) -> list[Tensor]:
    """The gradients of queries, of keys and values in one, and of the table."""
    q, kv = maps
    batch, num_heads, num_queries = lse.shape
    chosen = options(RELATIVE_GRADIENTS, q, table, sizes)
    most = UNALIGNED_PART_QUERIES if chosen["WIDTH"] % 8 else PART_QUERIES
    parts = blocks(num_queries, most * NARROW // max(NARROW, chosen["BLOCK_D"]))
    steps = blocks(blocks(num_queries, chosen["BLOCK_N"]), parts)
    groups = _groups(batch, parts * num_heads)
    grad_q, grad_kv = torch.empty_like(q), torch.empty_like(kv)
    sums = grad_kv if parts == 1 else table.new_empty(parts, *kv.shape)
    grad_table = table.new_empty(groups, *table.shape)
    launch(
        relative_gradients_kernel, (parts, num_heads, groups),
        grad, q, *kv.chunk(2, dim=-1), table, lse, grad_q, *sums.chunk(2, dim=-1), grad_table,
        batch, blocks(batch, groups), *sizes[:2], STEPS=steps, **chosen,
    )  # fmt: skip
    if parts > 1:
        size = kv.numel()
        launch(add_parts_kernel, (blocks(size, SUMS),), grad_kv, sums, parts, size, BLOCK=SUMS)
    return [grad_q, grad_kv, grad_table.sum(dim=0)]


def table_gradients(inputs: Inputs, delta: Tensor, sizes: Sizes) -> Tensor:
    """Parts of the sum over the batch of a table's gradient, [groups of images, h, N, M].

    `delta` [B, h, N] are the means of the softmax weights' gradients.
    """
    table, batch = inputs.table, len(inputs.q)
    chosen = options(TABLE_GRADIENTS, inputs.q, table, sizes)
    steps = blocks(min(OWN_KEYS, sizes.num_keys), chosen["BLOCK_M"])
    programs = blocks(sizes.num_queries, chosen["BLOCK_N"])
    programs *= blocks(sizes.num_keys, chosen["BLOCK_M"] * steps)
    groups = _groups(batch, programs * len(table))
    grad_table = table.new_empty(groups, *table.shape)
    launch(
        table_gradients_kernel, (programs, len(table), groups),
        *inputs, delta, grad_table, batch, blocks(batch, groups), *sizes,
        COSINE=inputs.scale is not None, STEPS=steps, **chosen,
    )  # fmt: skip
    return grad_table


@attention.register_fake
def _attention_shapes(
    maps: list[Tensor], table: Tensor, embedding: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, *_ = _split(maps)
    lse = q.new_empty(q.shape[0], *table.shape[:2], dtype=torch.float32)
    return q.new_empty(q.shape), lse


@attention_gradients.register_fake
def _attention_gradient_shapes(
    grad: Tensor,
    lse: Tensor,
    maps: list[Tensor],
    table: Tensor,
    embedding: Tensor | None,
    scale: Tensor | None,
) -> list[Tensor]:
    inputs = (*maps, table, embedding, scale)
    return [x.new_empty(x.shape) for x in inputs if x is not None]


@register_flop_formula(getattr(torch.ops, LIBRARY).attention)
def _attention_flops(map_shapes: Any, table_shape: torch.Size, *_: Any, **__: Any) -> int:
    """The products of queries and keys, and of weights and values."""
    return 2 * _product_flops(map_shapes, table_shape)


@register_flop_formula(getattr(torch.ops, LIBRARY).attention_gradients)
def _attention_gradient_flops(
    grad: Any, lse: Any, map_shapes: Any, table_shape: torch.Size, *_: Any, **__: Any
) -> int:
    """The logits again, and the gradients of both factors of both products."""
    return 5 * _product_flops(map_shapes, table_shape)


def _product_flops(map_shapes: list[torch.Size], table_shape: torch.Size) -> int:
    batch, *_, width = map_shapes[0]
    width //= 3 if len(map_shapes) == 1 else 1
    return 2 * int(batch) * int(width) * prod(table_shape[1:])


def _split(maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, as views."""
    q, k, v = maps[0].chunk(3, dim=-1) if len(maps) == 1 else (maps[0], *maps[1].chunk(2, dim=-1))
    return q, k, v


def _sizes(maps: list[Tensor]) -> Sizes:
    q, kv = maps[0], maps[-1]
    return Sizes(prod(q.shape[1:3]), prod(kv.shape[1:3]), q.shape[-1], kv.shape[-1])


def options(
    tiles: dict[int, tuple[int, int, int]], q: Tensor, table: Tensor, sizes: Sizes
) -> dict[str, Any]:
    """What a kernel is built for: the tiles that registers suffice for, for queries [B, ..., C]."""
    width = q.shape[-1] // len(table)
    wide = padded(width)
    queries, keys, num_warps = tiles[q.element_size()]
    queries = max(16, queries * NARROW // max(NARROW, wide))
    block = min(queries, padded(sizes.num_queries))
    return {
        "WIDTH": width,
        "BLOCK_N": block,
        "BLOCK_M": min(keys, padded(sizes.num_keys)),
        "BLOCK_D": wide,
        "num_warps": num_warps if block == queries else 4,
        "num_stages": 1,
        # Left to itself, the assembler would spill to let a multiprocessor hold more programs.
        "maxnreg": 255,
    }


def blocks(count: int, size: int) -> int:
    """How many blocks of a size hold so many."""
    return -(-count // size)


def padded(count: int) -> int:
    """The side of a tile for so many rows or columns: the tensor cores' least is 16."""
    return max(16, 1 << (count - 1).bit_length())


def _groups(batch: int, programs: int) -> int:
    """The number of groups that images are divided into, for so many programs a group."""
    return max(1, min(PROGRAMS // programs, batch // IMAGES))


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


FASTER["cosine_attention"] = _CosineAttention
FASTER["relative_attention"] = _RelativeAttention
