"""The kernel of aggregated attention, and what the kernel of its gradients needs of it too.

A program owns one head of an image's columns in a strip, and walks down it, row by row. Columns are
sixteen to a strip, of which those at its borders are only seen, by the windows of the others. The
rows that a window spans stay in registers, and so do the pooled tokens where they are few: each
pixel is loaded once by its own strip, and once more if it lies beside one.

Products are of numbers as they are stored, so that a GPU computes them exactly before it adds them
up: lengths, scale and query embedding come in afterwards, in float32. Maps [B, H, W, C] are
contiguous, the channels of a head, `HEAD`, side by side, and in tiles filled up to `WIDE`; a
window's places are filled up to `SLOTS`. What is no map is float32.
"""

import triton
import triton.language as tl

from .attention import (
    NEVER,
    cosines,
    inverse_length,
    key_factors,
    load_embedding,
    load_table,
    load_tokens,
    narrow,
)

# Columns of a strip: what a tensor core multiplies at least.
COLUMNS = tl.constexpr(16)


@triton.jit
def aggregated_attention_kernel(
    q, k, v, pool_k, pool_v, query_embedding, scale, tokens, token_bias, local_bias, pool_bias,
    out, log_sum, height, width, num_heads, num_pooled,
    HEAD: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr,
    POOLED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The mixed values, and the logarithm of each softmax's sum [B, h, N].

    Pooled tokens are taken `POOLED` at a time; `WHOLE` says that these are all.
    """
    REACH: tl.constexpr = WINDOW // 2
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lanes, channels, places = tl.arange(0, COLUMNS), tl.arange(0, WIDE), tl.arange(0, POOLED)
    columns = tl.program_id(0) * (COLUMNS - 2 * REACH) + lanes - REACH
    there = (columns >= 0) & (columns < width)
    own = there & (lanes >= REACH) & (lanes < COLUMNS - REACH)
    in_head = (channels < HEAD)[None, :]
    stride, num_queries = num_heads * HEAD, height * width
    pixels = columns[:, None] * stride + channels[None, :]
    start = image * num_queries * stride + head * HEAD
    q, out = q + start, out + start
    log_sum += (image * num_heads + head) * num_queries
    scale += head * num_queries
    pool_bias += head * num_queries * num_pooled
    owned = own[:, None] & in_head
    pooled = image * num_pooled * stride + head * HEAD
    pool_k, pool_v = pool_k + pooled, pool_v + pooled
    far_key = load_tokens(pool_k, places, num_pooled, stride, HEAD, WIDE)
    far_value = load_tokens(pool_v, places, num_pooled, stride, HEAD, WIDE)

    embedding = load_embedding(query_embedding, head, True, HEAD, WIDE)
    token = load_learned(tokens, head, channels, HEAD, WINDOW, SLOTS)
    # How many columns a key is right of a query's window's first.
    offset = lanes[None, :] - lanes[:, None] + REACH
    near = (offset >= 0) & (offset < WINDOW) & there[None, :]

    keys_at = k + start, v + start, pixels, height, width, stride, there[:, None] & in_head
    keys, values, lengths, embedded = first_rows(keys_at, embedding, WINDOW)
    for row in range(height):
        keys, values, lengths, embedded = next_rows(
            keys, values, lengths, embedded, keys_at, row + REACH, embedding, WINDOW
        )
        place = pixels + row * width * stride
        query = tl.load(q + place, mask=owned, other=0.0)
        rows = tl.where(own, row * width + columns, num_queries)
        inverse = inverse_length(query)
        sharpness = tl.load(scale + rows, mask=own, other=0.0)
        by_token = tl.trans(mix(token, tl.trans(query))) * inverse[:, None]

        top, total, mixed, added = _window_part(
            query, inverse, sharpness, by_token, keys, values, lengths, embedded, local_bias,
            token_bias, head, near, offset, row, height, WINDOW,
        )  # fmt: skip
        for first in range(0, num_pooled, POOLED):
            index = first + places
            if not WHOLE:
                far_key = load_tokens(pool_k, index, num_pooled, stride, HEAD, WIDE)
                far_value = load_tokens(pool_v, index, num_pooled, stride, HEAD, WIDE)
            far = far_logits(
                query, inverse, sharpness, embedding, far_key, pool_bias, rows, index,
                num_queries, num_pooled,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(far, axis=1))
            share = tl.exp(far - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(share, axis=1)
            mixed = mixed * shrink[:, None] + mix(share, far_value)
            top = higher

        tl.store(out + place, mixed / total[:, None] + added, mask=owned)
        tl.store(log_sum + rows, top + tl.log(total), mask=own)


@triton.jit
def _window_part(
    query, inverse, sharpness, by_token, keys, values, lengths, embedded, local_bias, token_bias,
    head, near, offset, row, height, WINDOW: tl.constexpr,
):  # fmt: skip
    """The window's highest logits, and its weights' sums, which are not divided yet.

    Of weights alone, of weights times values, and of what the learned tokens add to the weights.
    """
    logits = ()
    top = tl.full((COLUMNS,), NEVER, tl.float32)
    for i in tl.static_range(WINDOW):
        logit = cosines(query, keys[i], inverse, lengths[i], embedded[i]) * sharpness[:, None]
        logit += _by_offset(local_bias, head, offset, i, WINDOW)
        inside = near & (row + i >= WINDOW // 2) & (row + i < height + WINDOW // 2)
        logit = tl.where(inside, logit, -float("inf"))
        top = tl.maximum(top, tl.max(logit, axis=1))
        logits = logits + (logit,)
    total = tl.zeros((COLUMNS,), tl.float32)
    mixed = tl.zeros(query.shape, tl.float32)
    added = tl.zeros(query.shape, tl.float32)
    for i in tl.static_range(WINDOW):
        weight = tl.exp(logits[i] - top[:, None])
        total += tl.sum(weight, axis=1)
        mixed += mix(weight, values[i])
        extra = tl.gather(by_token, clamp(offset, WINDOW) + i * WINDOW, axis=1)
        extra += _by_offset(token_bias, head, offset, i, WINDOW)
        added += mix(tl.where(near, extra, 0.0), values[i])
    return top, total, mixed, added


@triton.jit
def first_rows(keys_at, embedding, WINDOW: tl.constexpr):
    """The rows that the window around the row above the map spans: see `_load_keys`."""
    keys, values, lengths, embedded = (), (), (), ()
    for i in tl.static_range(WINDOW):
        key, value, length, along = _load_keys(keys_at, i - WINDOW // 2 - 1, embedding)
        keys, values = keys + (key,), values + (value,)
        lengths, embedded = lengths + (length,), embedded + (along,)
    return keys, values, lengths, embedded


@triton.jit
def next_rows(keys, values, lengths, embedded, keys_at, row, embedding, WINDOW: tl.constexpr):
    """The rows of a window one further down, of which `row` is the last."""
    key, value, length, along = _load_keys(keys_at, row, embedding)
    keys, values = advance(keys, key, WINDOW), advance(values, value, WINDOW)
    lengths, embedded = advance(lengths, length, WINDOW), advance(embedded, along, WINDOW)
    return keys, values, lengths, embedded


@triton.jit
def _load_keys(keys_at, row, embedding):
    """A row's keys and values, and what makes cosines of the keys' products."""
    k, v, pixels, height, width, stride, seen = keys_at
    place = pixels + row * width * stride
    mask = seen & (row >= 0) & (row < height)
    key = tl.load(k + place, mask=mask, other=0.0)
    value = tl.load(v + place, mask=mask, other=0.0)
    length, along = key_factors(key, embedding, True)
    return key, value, length, along


@triton.jit
def load_learned(
    tokens, head, channels, HEAD: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr
):
    """A head's learned tokens [slots, d], of which there is one for each place of a window."""
    slots = tl.arange(0, SLOTS)
    mask = (channels[None, :] < HEAD) & (slots[:, None] < WINDOW * WINDOW)
    places = (head * HEAD + channels[None, :]) * WINDOW * WINDOW + slots[:, None]
    return tl.load(tokens + places, mask=mask, other=0.0)


@triton.jit
def far_logits(
    query, inverse, sharpness, embedding, key, bias, rows, index, num_queries, num_pooled
):
    """The logits of pooled keys, with their bias; `NEVER`, or less, beyond the last."""
    length, along = key_factors(key, embedding, True)
    logit = cosines(query, key, inverse, length, along) * sharpness[:, None]
    return logit + load_table(bias, rows, index, num_queries, num_pooled)


@triton.jit
def advance(rows, row, COUNT: tl.constexpr):
    """The rows of a window one further down."""
    moved = ()
    for i in tl.static_range(1, COUNT):
        moved = moved + (rows[i],)
    return moved + (row,)


@triton.jit
def product(a, b):
    """A product of numbers as they are stored."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def mix(weights, x):
    """float32 weights times numbers as they are stored."""
    return product(narrow(weights, x.dtype), x)


@triton.jit
def clamp(x, COUNT: tl.constexpr):
    """The index `x`, or the nearest of so many."""
    return tl.minimum(tl.maximum(x, 0), COUNT - 1)


@triton.jit
def _by_offset(table, head, offset, row: tl.constexpr, WINDOW: tl.constexpr):
    """Of a table [h, slots], each pair's entry, by how far apart the two are; 0 beyond."""
    entry = tl.zeros(offset.shape, tl.float32)
    for j in tl.static_range(WINDOW):
        entry = tl.where(offset == j, tl.load(table + (head * WINDOW + row) * WINDOW + j), entry)
    return entry
