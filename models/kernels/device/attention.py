"""Kernels of attention with a table of biases: cosine logits, or scaled dot products.

Tokens of an image are rows, some numbers apart, of which a head owns `WIDTH` columns; blocks are
padded to `BLOCK_D` columns. N queries, M keys, B images, h heads. Matrix products are of numbers
as they are stored; what scales or normalises them comes before or after, in float32. Cosine logits
are scale · (q̂ + embedding) · k̂, with scale [h, N] and embedding [h, d]. Nothing is moved out of
loops (`disable_licm`): registers would not suffice to keep it.
"""

import triton
import triton.language as tl

# Added to the logits of keys that do not exist.
NEVER = tl.constexpr(-1e30)


@triton.jit
def attention_kernel(
    q, k, v, table, embedding, scale, out, lse, num_queries, num_keys, q_stride, kv_stride,
    COSINE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """softmax(logits + table) @ v, and the logarithm of the softmax's denominator [B, h, N]."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    line = image * tl.num_programs(1) + head
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    q = q + image * num_queries * q_stride + head * WIDTH
    k = k + image * num_keys * kv_stride + head * WIDTH
    v = v + image * num_keys * kv_stride + head * WIDTH
    table = table + head.to(tl.int64) * num_queries * num_keys
    if COSINE:
        scale = scale + head * num_queries
    constant = load_embedding(embedding, head, COSINE, WIDTH, BLOCK_D)
    queries = load_tokens(q, rows, num_queries, q_stride, WIDTH, BLOCK_D)
    factor, inverse = query_factors(queries, scale, rows, num_queries, COSINE, WIDTH)

    highest = tl.full((BLOCK_N,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    mixed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in tl.range(0, num_keys, BLOCK_M, disable_licm=True):
        columns = first + tl.arange(0, BLOCK_M)
        keys = load_tokens(k, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        values = load_tokens(v, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        column, along = key_factors(keys, constant, COSINE)
        bias = load_table(table, rows, columns, num_queries, num_keys)
        logits = cosines(queries, keys, inverse, column, along) * factor[:, None] + bias
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        weights = tl.exp(logits - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = higher
    width = tl.num_programs(1) * WIDTH
    out = out + image * num_queries * width + head * WIDTH
    store_tokens(out, mixed / total[:, None], rows, num_queries, width, WIDTH, BLOCK_D)
    tl.store(lse + line * num_queries + rows, highest + tl.log(total), mask=rows < num_queries)


@triton.jit
def load_tokens(start, rows, count, stride, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of a head's tokens; 0 beyond them."""
    channels = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (channels < WIDTH)[None, :]
    return tl.load(start + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
def store_tokens(start, tokens, rows, count, stride, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of `load_tokens`."""
    channels = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (channels < WIDTH)[None, :]
    tl.store(start + rows[:, None] * stride + channels[None, :], tokens, mask=inside)


@triton.jit
def load_table(table, rows, columns, num_queries, num_keys):
    """A tile of the table of a head; `NEVER` beyond it."""
    inside = (rows < num_queries)[:, None] & (columns < num_keys)[None, :]
    return tl.load(table + rows[:, None] * num_keys + columns[None, :], mask=inside, other=NEVER)


@triton.jit
def load_embedding(
    embedding, head, COSINE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A head's query embedding, if logits are cosines."""
    constant = 0.0
    if COSINE:
        channels = tl.arange(0, BLOCK_D)
        constant = tl.load(embedding + head * WIDTH + channels, mask=channels < WIDTH, other=0.0)
    return constant


@triton.jit
def query_factors(queries, scale, rows, num_queries, COSINE: tl.constexpr, WIDTH: tl.constexpr):
    """What logits are multiplied by, and what queries are to be multiplied by before."""
    if COSINE:
        factor = tl.load(scale + rows, mask=rows < num_queries, other=0.0)
        inverse = inverse_length(queries)
    else:
        factor = tl.full(rows.shape, WIDTH**-0.5, tl.float32)
        inverse = tl.full(rows.shape, 1.0, tl.float32)
    return factor, inverse


@triton.jit
def key_factors(keys, constant, COSINE: tl.constexpr):
    """What keys are to be multiplied by, and the query embedding · unit keys."""
    if COSINE:
        inverse = inverse_length(keys)
        along = tl.sum(keys.to(tl.float32) * constant[None, :], axis=1) * inverse
    else:
        inverse = tl.full((keys.shape[0],), 1.0, tl.float32)
        along = tl.full((keys.shape[0],), 0.0, tl.float32)
    return inverse, along


@triton.jit
def inverse_length(tokens):
    """One over the length of each token."""
    wide = tokens.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), 1e-12)


@triton.jit
def cosines(queries, keys, inverse, column, along):
    """(q̂ + embedding) · k̂, or q · k: the logits before they are scaled."""
    products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    return products * inverse[:, None] * column[None, :] + along[None, :]


@triton.jit
def narrow(x, dtype):
    """Rounded to a map's dtype, and held to the range of float16 there.

    What a length of nearly 0 has multiplied would be infinite, and times that vector not a number.
    """
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit
def unit_gradient(grad, unit, inverse):
    """The gradient of tokens by that of the same at length one; a length at its floor is fixed."""
    along = tl.where(inverse < 1e12, tl.sum(unit * grad, axis=1), 0.0)
    return (grad - unit * along[:, None]) * inverse[:, None]
