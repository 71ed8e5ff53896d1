"""Kernels of aggregated attention.

A program owns one head of an image's columns in a strip, and walks down it, row by row. Columns are
sixteen to a strip, of which those at its borders are only seen, by the windows of the others. The
rows that a window spans stay in registers, and so do the pooled tokens: each pixel is loaded once
by its own strip, and once more if it lies beside one.

Products are of the numbers as they are stored, so that a GPU computes them exactly before it adds
them up: lengths, temperature and query embedding come in afterwards, in float32. Maps [B, H, W, C]
are contiguous, the channels of a head side by side.
"""

import triton
import triton.language as tl

# Columns of a strip, and pooled tokens at once: what a tensor core multiplies at least.
COLUMNS = tl.constexpr(16)


@triton.jit
def aggregated_attention_kernel(
    q,
    k,
    v,
    pool_k,
    pool_v,
    query_embedding,
    sharpness,
    local_bias,
    pool_bias,
    tokens,
    token_bias,
    out,
    log_sum,
    height,
    width,
    num_heads,
    num_pooled,
    HEAD: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    POOLED: tl.constexpr,
):
    """The mixed values, and the logarithm of each softmax's sum [B, h, N]."""
    REACH: tl.constexpr = WINDOW // 2
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lanes, channels, places = tl.arange(0, COLUMNS), tl.arange(0, WIDE), tl.arange(0, POOLED)
    columns = tl.program_id(0) * (COLUMNS - 2 * REACH) + lanes - REACH
    there = (columns >= 0) & (columns < width)
    own = there & (lanes >= REACH) & (lanes < COLUMNS - REACH)
    in_head = channels < HEAD
    stride = num_heads * HEAD
    start = image * height * width * stride + head * HEAD
    pixels = start + columns[:, None] * stride + channels[None, :]
    seen, owned = there[:, None] & in_head[None, :], own[:, None] & in_head[None, :]

    embedding = tl.load(query_embedding + head * HEAD + channels, mask=in_head, other=0.0)
    sharp = tl.load(sharpness + head)
    slots = tl.arange(0, SLOTS)
    token = tl.load(
        tokens + (head * HEAD + channels[:, None]) * WINDOW * WINDOW + slots[None, :],
        mask=in_head[:, None] & (slots[None, :] < WINDOW * WINDOW),
        other=0.0,
    )
    # How many columns a key is right of a query's window's first.
    offset = lanes[None, :] - lanes[:, None] + REACH
    near = (offset >= 0) & (offset < WINDOW) & there[None, :]
    columns_seen = tl.minimum(columns + REACH, width - 1) - tl.maximum(columns - REACH, 0) + 1

    keys, values, lengths, embedded = (), (), (), ()
    for i in tl.static_range(WINDOW):
        row = i - REACH - 1
        key, value, length, along = _load_keys(
            k, v, pixels, row, height, width, stride, seen, embedding
        )
        keys, values = keys + (key,), values + (value,)
        lengths, embedded = lengths + (length,), embedded + (along,)

    for row in range(height):
        key, value, length, along = _load_keys(
            k, v, pixels, row + REACH, height, width, stride, seen, embedding
        )
        keys, values = _next(keys, key, WINDOW), _next(values, value, WINDOW)
        lengths, embedded = _next(lengths, length, WINDOW), _next(embedded, along, WINDOW)

        query = tl.load(q + pixels + row * width * stride, mask=seen, other=0.0)
        inverse = _inverse_length(query)
        rows_seen = tl.minimum(row + REACH, height - 1) - tl.maximum(row - REACH, 0) + 1
        scale = sharp * tl.log(tl.maximum(rows_seen * columns_seen + num_pooled, 1).to(tl.float32))
        by_token = _product(query, token.to(query.dtype)) * inverse[:, None]

        # The window, a row of it at a time.
        logits = ()
        top = tl.full((COLUMNS,), -float("inf"), tl.float32)
        for i in tl.static_range(WINDOW):
            products = _product(query, tl.trans(keys[i])) * inverse[:, None] + embedded[i][None, :]
            logit = products * lengths[i][None, :] * scale[:, None]
            for j in tl.static_range(WINDOW):
                bias = tl.load(local_bias + (head * WINDOW + i) * WINDOW + j)
                logit = tl.where(offset == j, logit + bias, logit)
            inside = (row + i >= REACH) & (row + i < height + REACH)
            logit = tl.where(near & inside, logit, -float("inf"))
            top = tl.maximum(top, tl.max(logit, axis=1))
            logits = logits + (logit,)
        top = tl.where(own, top, 0.0)
        total = tl.zeros((COLUMNS,), tl.float32)
        mixed = tl.zeros((COLUMNS, WIDE), tl.float32)
        added = tl.zeros((COLUMNS, WIDE), tl.float32)
        for i in tl.static_range(WINDOW):
            weight = tl.exp(logits[i] - top[:, None])
            total += tl.sum(weight, axis=1)
            mixed += _product(weight.to(value.dtype), values[i])
            extra = tl.gather(by_token, _clamp(offset, WINDOW) + i * WINDOW, axis=1)
            for j in tl.static_range(WINDOW):
                bias = tl.load(token_bias + (head * WINDOW + i) * WINDOW + j)
                extra = tl.where(offset == j, extra + bias, extra)
            extra = tl.where(near, extra, 0.0)
            added += _product(extra.to(value.dtype), values[i])

        # The pooled tokens.
        for first in range(0, num_pooled, POOLED):
            index = first + places
            is_token = index < num_pooled
            pooled = (image * num_pooled + index[:, None]) * stride + head * HEAD + channels[None, :]
            far_mask = is_token[:, None] & in_head[None, :]
            far_key = tl.load(pool_k + pooled, mask=far_mask, other=0.0)
            far_value = tl.load(pool_v + pooled, mask=far_mask, other=0.0)
            far_along = tl.sum(far_key.to(tl.float32) * embedding[None, :], axis=1)
            far_products = _product(query, tl.trans(far_key)) * inverse[:, None] + far_along[None, :]
            far = far_products * _inverse_length(far_key)[None, :] * scale[:, None]
            pairs = ((head * height + row) * width + columns[:, None]) * num_pooled + index[None, :]
            wanted = own[:, None] & is_token[None, :]
            far += tl.load(pool_bias + pairs, mask=wanted, other=0.0)
            far = tl.where(is_token[None, :], far, -float("inf"))
            higher = tl.maximum(top, tl.max(far, axis=1))
            share = tl.exp(far - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(share, axis=1)
            mixed = mixed * shrink[:, None] + _product(share.to(far_value.dtype), far_value)
            top = higher

        mixed = mixed / total[:, None] + added
        tl.store(out + pixels + row * width * stride, mixed, mask=owned)
        place = ((image * num_heads + head) * height + row) * width + columns
        tl.store(log_sum + place, top + tl.log(total), mask=own)


@triton.jit
def _load_keys(k, v, pixels, row, height, width, stride, seen, embedding):
    """A row's keys and values, the keys' inverse lengths, and their products with the embedding."""
    mask = seen & (row >= 0) & (row < height)
    key = tl.load(k + pixels + row * width * stride, mask=mask, other=0.0)
    value = tl.load(v + pixels + row * width * stride, mask=mask, other=0.0)
    along = tl.sum(key.to(tl.float32) * embedding[None, :], axis=1)
    return key, value, _inverse_length(key), along


@triton.jit
def _next(rows, row, COUNT: tl.constexpr):
    """The rows of a window one further down."""
    moved = ()
    for i in tl.static_range(1, COUNT):
        moved = moved + (rows[i],)
    return moved + (row,)


@triton.jit
def _inverse_length(x):
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _clamp(x, COUNT: tl.constexpr):
    return tl.minimum(tl.maximum(x, 0), COUNT - 1)
