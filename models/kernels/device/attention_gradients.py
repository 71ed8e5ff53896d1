"""Kernels of the gradients of `attention`, where that is described too."""

import triton
import triton.language as tl

from .attention import (
    NEVER,
    cosines,
    key_factors,
    load_embedding,
    load_table,
    load_tokens,
    narrow,
    query_factors,
    store_tokens,
    unit_gradient,
)


@triton.jit
def query_gradients_kernel(
    grad, q, k, v, table, embedding, scale, lse, grad_q, grad_scale, delta, num_queries,
    num_keys, q_stride, kv_stride,
    COSINE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of queries, and of scales [B, h, N], where keys are several blocks.

    Also `delta` [B, h, N], the mean of the weights' gradients, which the gradients of the logits
    are measured from: it comes first, in a round over the keys of its own.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    line = image * tl.num_programs(1) + head
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < num_queries
    width = tl.num_programs(1) * WIDTH
    grad = grad + image * num_queries * width + head * WIDTH
    q = q + image * num_queries * q_stride + head * WIDTH
    grad_q = grad_q + image * num_queries * q_stride + head * WIDTH
    k = k + image * num_keys * kv_stride + head * WIDTH
    v = v + image * num_keys * kv_stride + head * WIDTH
    table = table + head.to(tl.int64) * num_queries * num_keys
    if COSINE:
        scale = scale + head * num_queries
    constant = load_embedding(embedding, head, COSINE, WIDTH, BLOCK_D)
    queries = load_tokens(q, rows, num_queries, q_stride, WIDTH, BLOCK_D)
    factor, inverse = query_factors(queries, scale, rows, num_queries, COSINE, WIDTH)
    grads = load_tokens(grad, rows, num_queries, width, WIDTH, BLOCK_D)
    denominator = tl.load(lse + line * num_queries + rows, mask=there, other=float("inf"))

    mean = tl.zeros((BLOCK_N,), tl.float32)
    grad_factor = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for turn in tl.static_range(2):
        for first in tl.range(0, num_keys, BLOCK_M, disable_licm=True):
            columns = first + tl.arange(0, BLOCK_M)
            keys = load_tokens(k, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            values = load_tokens(v, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            column, along = key_factors(keys, constant, COSINE)
            bias = load_table(table, rows, columns, num_queries, num_keys)
            cosine = cosines(queries, keys, inverse, column, along)
            weights = tl.exp(cosine * factor[:, None] + bias - denominator[:, None])
            grad_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
            if turn == 0:
                mean += tl.sum(weights * grad_weights, axis=1)
            else:
                grad_logits = weights * (grad_weights - mean[:, None])
                grad_factor += tl.sum(grad_logits * cosine, axis=1)
                scaled = grad_logits * factor[:, None] * column[None, :]
                total += tl.dot(narrow(scaled, keys.dtype), keys, input_precision="ieee")
    tl.store(delta + line * num_queries + rows, mean, mask=there)
    if COSINE:
        tl.store(grad_scale + line * num_queries + rows, grad_factor, mask=there)
    store_query_gradients(
        grad_q, total, queries, inverse, rows, num_queries, q_stride, COSINE, WIDTH, BLOCK_D
    )


@triton.jit
def attention_gradients_kernel(
    grad, q, k, v, table, embedding, scale, lse, delta, grad_q, grad_k, grad_v, grad_table,
    grad_embedding, grad_scale, batch, images, num_queries, num_keys, q_stride, kv_stride,
    COSINE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and of their values, by all the queries of some images.

    Where `STEPS` is 0, `delta` is read. Otherwise the block of keys is all there are, and queries
    are so many blocks: gradients of queries and scales [B, h, N] are complete, and written, and the
    table's [groups of images, h, N, M] stays in registers from image to image. `grad_embedding`
    [groups of images and blocks of keys, h, d] is to be added up as well.
    """
    head, group, num_heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = num_heads * WIDTH
    table = table + head.to(tl.int64) * num_queries * num_keys
    if COSINE:
        scale = scale + head * num_queries
    constant = load_embedding(embedding, head, COSINE, WIDTH, BLOCK_D)

    grad_constant = tl.zeros((BLOCK_D,), tl.float32)
    grad_bias = tiles(STEPS, BLOCK_M, BLOCK_N)
    for turn in tl.range(
        group * images, tl.minimum((group + 1) * images, batch), disable_licm=True
    ):
        image = tl.cast(turn, tl.int64)
        line = (image * num_heads + head) * num_queries
        query_place = image * num_queries * q_stride + head * WIDTH
        grads_at = grad + image * num_queries * width + head * WIDTH
        key_place = image * num_keys * kv_stride + head * WIDTH
        keys = load_tokens(k + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        values = load_tokens(v + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        column, along = key_factors(keys, constant, COSINE)
        grad_keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        grad_values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        grad_along = tl.zeros((BLOCK_M,), tl.float32)
        for start in tl.range(0, num_queries, BLOCK_N, disable_licm=True):
            rows = start + tl.arange(0, BLOCK_N)
            queries = load_tokens(q + query_place, rows, num_queries, q_stride, WIDTH, BLOCK_D)
            grads = load_tokens(grads_at, rows, num_queries, width, WIDTH, BLOCK_D)
            grad_values, cosine, grad_logits, factor, inverse = differentiate_by_key(
                grad_values, queries, grads, keys, values, column, along, table, scale, lse + line,
                delta + line, rows, columns, num_queries, num_keys, COSINE, STEPS > 0, WIDTH,
            )  # fmt: skip
            grad_bias = add_at(grad_bias, start // BLOCK_N, grad_logits, STEPS)
            if COSINE and STEPS > 0:
                part = tl.sum(grad_logits * cosine, axis=0)
                tl.store(grad_scale + line + rows, part, mask=rows < num_queries)
            grad_logits = grad_logits * factor[None, :]
            grad_along += tl.sum(grad_logits, axis=1)
            scaled = narrow(grad_logits * inverse[None, :], queries.dtype)
            grad_keys += tl.dot(scaled, queries, input_precision="ieee")
            if STEPS > 0:
                scaled = tl.trans(narrow(grad_logits * column[:, None], keys.dtype))
                total = tl.dot(scaled, keys, input_precision="ieee")
                store_query_gradients(
                    grad_q + query_place, total, queries, inverse, rows, num_queries, q_stride,
                    COSINE, WIDTH, BLOCK_D,
                )  # fmt: skip
        if COSINE:
            # Read again: there are no registers to keep them in float32 all along.
            keys = load_tokens(k + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            unit = keys.to(tl.float32) * column[:, None]
            grad_constant += tl.sum(unit * grad_along[:, None], axis=0)
            grad_keys += grad_along[:, None] * constant[None, :]
            grad_keys = unit_gradient(grad_keys, unit, column)
        store_tokens(grad_k + key_place, grad_keys, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        store_tokens(grad_v + key_place, grad_values, columns, num_keys, kv_stride, WIDTH, BLOCK_D)

    for step in tl.static_range(STEPS):
        rows = step * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < num_queries)[None, :] & (columns < num_keys)[:, None]
        part = grad_table + (group * num_heads + head).to(tl.int64) * num_queries * num_keys
        places = rows[None, :] * num_keys + columns[:, None]
        tl.store(part + places, grad_bias[step], mask=inside)
    if COSINE:
        place = ((group * tl.num_programs(0) + tl.program_id(0)) * num_heads + head) * WIDTH
        channels = tl.arange(0, BLOCK_D)
        tl.store(grad_embedding + place + channels, grad_constant, mask=channels < WIDTH)


@triton.jit
def relative_gradients_kernel(
    grad, q, k, v, table, lse, grad_q, grad_k, grad_v, grad_table, batch, images, num_queries,
    num_keys, STEPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All gradients of scaled dot products, by some queries of some images; keys are one block.

    A program owns `STEPS` blocks of queries, and keeps the table's gradient [groups of images, h,
    N, M] in registers from image to image. Those of keys and values are the parts of these queries,
    [parts, B, M, 2hd], to be added up. Queries are in a map of their own, keys and values in one.
    """
    head, group, num_heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    # Computed here, they are known to be multiples of the width.
    q_stride = num_heads * WIDTH
    kv_stride = 2 * q_stride
    begin = tl.program_id(0) * STEPS * BLOCK_N
    end = tl.minimum(begin + STEPS * BLOCK_N, num_queries)
    part = tl.program_id(0).to(tl.int64) * batch * num_keys * kv_stride
    columns = tl.arange(0, BLOCK_M)
    factor = WIDTH**-0.5
    table = table + head.to(tl.int64) * num_queries * num_keys
    totals = tiles(STEPS, BLOCK_N, BLOCK_M)
    for turn in tl.range(
        group * images, tl.minimum((group + 1) * images, batch), disable_licm=True
    ):
        image = tl.cast(turn, tl.int64)
        line = (image * num_heads + head) * num_queries
        place = image * num_queries * q_stride + head * WIDTH
        key_place = image * num_keys * kv_stride + head * WIDTH
        keys = load_tokens(k + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        values = load_tokens(v + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        grad_keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        grad_values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for step in tl.range(0, tl.cdiv(end - begin, BLOCK_N), disable_licm=True):
            rows = begin + step * BLOCK_N + tl.arange(0, BLOCK_N)
            queries = load_tokens(q + place, rows, num_queries, q_stride, WIDTH, BLOCK_D)
            grads = load_tokens(grad + place, rows, num_queries, q_stride, WIDTH, BLOCK_D)
            bias = load_table(table, rows, columns, num_queries, num_keys)
            denominator = tl.load(lse + line + rows, mask=rows < num_queries, other=float("inf"))
            logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor + bias
            weights = tl.exp(logits - denominator[:, None])
            spread = tl.trans(weights.to(grads.dtype))
            grad_values += tl.dot(spread, grads, input_precision="ieee")
            grad_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
            mean = tl.sum(weights * grad_weights, axis=1)
            grad_logits = weights * (grad_weights - mean[:, None])
            totals = add_at(totals, step, grad_logits, STEPS)
            rounded = narrow(grad_logits, queries.dtype)
            grad_keys += tl.dot(tl.trans(rounded), queries, input_precision="ieee")
            total = tl.dot(rounded, keys, input_precision="ieee") * factor
            store_tokens(grad_q + place, total, rows, num_queries, q_stride, WIDTH, BLOCK_D)
        key_place += part
        grad_keys *= factor
        store_tokens(grad_k + key_place, grad_keys, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        store_tokens(grad_v + key_place, grad_values, columns, num_keys, kv_stride, WIDTH, BLOCK_D)

    grad_table = grad_table + (group * num_heads + head).to(tl.int64) * num_queries * num_keys
    for step in tl.static_range(STEPS):
        rows = begin + step * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < num_queries)[:, None] & (columns < num_keys)[None, :]
        places = rows[:, None] * num_keys + columns[None, :]
        tl.store(grad_table + places, totals[step], mask=inside)


@triton.jit
def add_parts_kernel(out, parts, count, size, BLOCK: tl.constexpr):
    """The sum of so many tensors of a size, one after another in memory, in the dtype of `out`."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(count):
        part = parts + tl.cast(number, tl.int64) * size
        total += tl.load(part + places, mask=places < size, other=0.0)
    tl.store(out + places, total, mask=places < size)


@triton.jit
def table_gradients_kernel(
    grad, q, k, v, table, embedding, scale, lse, delta, grad_table, batch, images, num_queries,
    num_keys, q_stride, kv_stride,
    COSINE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of the gradients of the logits over some images, [groups of images, h, N, M].

    A program owns a block of queries and `STEPS` of keys, and keeps their sum in registers.
    """
    head, group = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    parts = tl.cdiv(num_keys, STEPS * BLOCK_M)
    rows = tl.program_id(0) // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % parts * STEPS * BLOCK_M
    there = rows < num_queries
    width = num_heads * WIDTH
    table = table + head.to(tl.int64) * num_queries * num_keys
    if COSINE:
        scale = scale + head * num_queries
    constant = load_embedding(embedding, head, COSINE, WIDTH, BLOCK_D)
    totals = tiles(STEPS, BLOCK_N, BLOCK_M)
    for turn in tl.range(
        group * images, tl.minimum((group + 1) * images, batch), disable_licm=True
    ):
        image = tl.cast(turn, tl.int64)
        line = (image * num_heads + head) * num_queries
        grads_at = grad + image * num_queries * width + head * WIDTH
        queries_at = q + image * num_queries * q_stride + head * WIDTH
        key_place = image * num_keys * kv_stride + head * WIDTH
        grads = load_tokens(grads_at, rows, num_queries, width, WIDTH, BLOCK_D)
        queries = load_tokens(queries_at, rows, num_queries, q_stride, WIDTH, BLOCK_D)
        denominator = tl.load(lse + line + rows, mask=there, other=float("inf"))
        mean = tl.load(delta + line + rows, mask=there, other=0.0)
        factor, inverse = query_factors(queries, scale, rows, num_queries, COSINE, WIDTH)
        for start in tl.range(0, STEPS * BLOCK_M, BLOCK_M, disable_licm=True):
            columns = first + start + tl.arange(0, BLOCK_M)
            keys = load_tokens(k + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            values = load_tokens(v + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            column, along = key_factors(keys, constant, COSINE)
            bias = load_table(table, rows, columns, num_queries, num_keys)
            cosine = cosines(queries, keys, inverse, column, along)
            weights = tl.exp(cosine * factor[:, None] + bias - denominator[:, None])
            grad_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
            totals = add_at(
                totals, start // BLOCK_M, weights * (grad_weights - mean[:, None]), STEPS
            )
    grad_table = grad_table + (group * num_heads + head).to(tl.int64) * num_queries * num_keys
    for step in tl.static_range(STEPS):
        columns = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = there[:, None] & (columns < num_keys)[None, :]
        places = rows[:, None] * num_keys + columns[None, :]
        tl.store(grad_table + places, totals[step], mask=inside)


@triton.jit
def differentiate_by_key(
    grad_values, queries, grads, keys, values, column, along, table, scale, lse, delta,
    rows, columns, num_queries, num_keys,
    COSINE: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of values; return these, and, a row for each key, cosines and gradients
    of the logits, and the factors of queries.
    """
    there = rows < num_queries
    inside = there[None, :] & (columns < num_keys)[:, None]
    places = rows[None, :] * num_keys + columns[:, None]
    bias = tl.load(table + places, mask=inside, other=NEVER)
    denominator = tl.load(lse + rows, mask=there, other=float("inf"))
    factor, inverse = query_factors(queries, scale, rows, num_queries, COSINE, WIDTH)
    cosine = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    cosine = cosine * column[:, None] * inverse[None, :] + along[:, None]
    weights = tl.exp(cosine * factor[None, :] + bias - denominator[None, :])
    grad_values += tl.dot(weights.to(grads.dtype), grads, input_precision="ieee")
    grad_weights = tl.dot(values, tl.trans(grads), input_precision="ieee")
    if WHOLE:
        mean = tl.sum(weights * grad_weights, axis=0)
    else:
        mean = tl.load(delta + rows, mask=there, other=0.0)
    return grad_values, cosine, weights * (grad_weights - mean[None, :]), factor, inverse


@triton.jit
def tiles(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some tiles in registers, of zeros."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return zeros


@triton.jit
def add_at(totals, place, value, COUNT: tl.constexpr):
    """Add to one of some tiles in registers, where the place is not known to the compiler."""
    sums = ()
    for i in tl.static_range(COUNT):
        total = totals[i]
        if place == i:
            total += value
        sums = sums + (total,)
    return sums


@triton.jit
def store_query_gradients(
    start, total, queries, inverse, rows, num_queries, stride,
    COSINE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the gradients of queries by those of unit ones."""
    if COSINE:
        total = unit_gradient(total, queries.to(tl.float32) * inverse[:, None], inverse)
    store_tokens(start, total, rows, num_queries, stride, WIDTH, BLOCK_D)
