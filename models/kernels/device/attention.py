"""Kernels of attention with a table of biases: cosine logits, or scaled dot products.

Tokens of an image are rows, some numbers apart, of which a head owns `WIDTH` columns; blocks are
padded to `BLOCK_D` columns. N queries, M keys, B images, h heads. Matrix products are of numbers
as they are stored; what scales or normalises them comes before or after, in float32. Cosine logits
are scale · (q̂ + embedding) · k̂, with scale [h, N] and embedding [h, d].
"""

import triton
import triton.language as tl

# Added to the logits of keys that do not exist.
NEVER = tl.constexpr(-1e30)


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    table,
    embedding,
    scale,
    out,
    lse,
    num_queries,
    num_keys,
    q_stride,
    kv_stride,
    COSINE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
    constant = _load_embedding(embedding, head, COSINE, WIDTH, BLOCK_D)
    queries = _load_tokens(q, rows, num_queries, q_stride, WIDTH, BLOCK_D)
    factor, inverse = _query_factors(queries, scale, rows, num_queries, COSINE)

    highest = tl.full((BLOCK_N,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    mixed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in tl.range(0, num_keys, BLOCK_M, disable_licm=True):
        columns = first + tl.arange(0, BLOCK_M)
        keys = _load_tokens(k, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        values = _load_tokens(v, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        column, along = _key_factors(keys, constant, COSINE)
        bias = _load_table(table, rows, columns, num_queries, num_keys)
        logits = _cosines(queries, keys, inverse, column, along, COSINE, WIDTH)
        if COSINE:
            logits = logits * factor[:, None]
        logits += bias
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        weights = tl.exp(logits - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = higher
    width = tl.num_programs(1) * WIDTH
    out = out + image * num_queries * width + head * WIDTH
    _store_tokens(out, mixed / total[:, None], rows, num_queries, width, WIDTH, BLOCK_D)
    tl.store(lse + line * num_queries + rows, highest + tl.log(total), mask=rows < num_queries)


@triton.jit
def query_gradients_kernel(
    grad,
    q,
    k,
    v,
    table,
    embedding,
    scale,
    lse,
    grad_q,
    grad_scale,
    delta,
    num_queries,
    num_keys,
    q_stride,
    kv_stride,
    COSINE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
    constant = _load_embedding(embedding, head, COSINE, WIDTH, BLOCK_D)
    queries = _load_tokens(q, rows, num_queries, q_stride, WIDTH, BLOCK_D)
    factor, inverse = _query_factors(queries, scale, rows, num_queries, COSINE)
    grads = _load_tokens(grad, rows, num_queries, width, WIDTH, BLOCK_D)
    denominator = tl.load(lse + line * num_queries + rows, mask=there, other=float("inf"))

    mean = tl.zeros((BLOCK_N,), tl.float32)
    grad_factor = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for turn in tl.static_range(2):
        for first in tl.range(0, num_keys, BLOCK_M, disable_licm=True):
            columns = first + tl.arange(0, BLOCK_M)
            keys = _load_tokens(k, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            values = _load_tokens(v, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            column, along = _key_factors(keys, constant, COSINE)
            bias = _load_table(table, rows, columns, num_queries, num_keys)
            cosines = _cosines(queries, keys, inverse, column, along, COSINE, WIDTH)
            logits = cosines
            if COSINE:
                logits = cosines * factor[:, None]
            weights = tl.exp(logits + bias - denominator[:, None])
            grad_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
            if turn == 0:
                mean += tl.sum(weights * grad_weights, axis=1)
            else:
                grad_logits = weights * (grad_weights - mean[:, None])
                scaled = grad_logits * WIDTH**-0.5
                if COSINE:
                    grad_factor += tl.sum(grad_logits * cosines, axis=1)
                    scaled = grad_logits * factor[:, None] * column[None, :]
                total += tl.dot(scaled.to(keys.dtype), keys, input_precision="ieee")
    tl.store(delta + line * num_queries + rows, mean, mask=there)
    if COSINE:
        tl.store(grad_scale + line * num_queries + rows, grad_factor, mask=there)
    _store_query_gradients(
        grad_q, total, queries, inverse, rows, num_queries, q_stride, COSINE, WIDTH, BLOCK_D
    )


@triton.jit
def attention_gradients_kernel(
    grad,
    q,
    k,
    v,
    table,
    embedding,
    scale,
    lse,
    delta,
    grad_q,
    grad_k,
    grad_v,
    grad_table,
    grad_embedding,
    grad_scale,
    batch,
    images,
    num_queries,
    num_keys,
    q_stride,
    kv_stride,
    COSINE: tl.constexpr,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a block of keys and of their values, by all the queries of some images.

    Tiles have a row for each key. Where the block of keys is `WHOLE`, all there are, gradients of
    queries and scales [B, h, N] are complete, and written, with `delta`; otherwise `delta` is read.
    Where `STEPS` is not 0, queries are so many blocks, and the gradient of the table stays in
    registers while the program goes from image to image: `grad_table` [groups of images, h, N, M].
    `grad_embedding` [groups of images and blocks of keys, h, d] are parts to be added up as well.
    """
    head, group = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = num_heads * WIDTH
    table = table + head.to(tl.int64) * num_queries * num_keys
    if COSINE:
        scale = scale + head * num_queries
    constant = _load_embedding(embedding, head, COSINE, WIDTH, BLOCK_D)

    grad_constant = tl.zeros((BLOCK_D,), tl.float32)
    grad_bias = ()
    for _ in tl.static_range(STEPS):
        grad_bias = grad_bias + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for turn in tl.range(
        group * images, tl.minimum((group + 1) * images, batch), disable_licm=True
    ):
        image = tl.cast(turn, tl.int64)
        line = (image * num_heads + head) * num_queries
        queries_at = q + image * num_queries * q_stride + head * WIDTH
        grad_queries_at = grad_q + image * num_queries * q_stride + head * WIDTH
        grads_at = grad + image * num_queries * width + head * WIDTH
        key_place = image * num_keys * kv_stride + head * WIDTH
        keys = _load_tokens(k + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        values = _load_tokens(v + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        column, along = _key_factors(keys, constant, COSINE)
        grad_keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        grad_values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        grad_along = tl.zeros((BLOCK_M,), tl.float32)
        for start in tl.range(0, num_queries, BLOCK_N, disable_licm=True):
            rows = start + tl.arange(0, BLOCK_N)
            there = rows < num_queries
            queries = _load_tokens(queries_at, rows, num_queries, q_stride, WIDTH, BLOCK_D)
            grads = _load_tokens(grads_at, rows, num_queries, width, WIDTH, BLOCK_D)
            denominator = tl.load(lse + line + rows, mask=there, other=float("inf"))
            inside = there[None, :] & (columns < num_keys)[:, None]
            places = rows[None, :] * num_keys + columns[:, None]
            bias = tl.load(table + places, mask=inside, other=NEVER)
            factor, inverse = _query_factors(queries, scale, rows, num_queries, COSINE)
            logits = tl.dot(keys, tl.trans(queries), input_precision="ieee")
            if COSINE:
                cosines = logits * column[:, None] * inverse[None, :] + along[:, None]
                logits = cosines * factor[None, :]
            else:
                logits = logits * WIDTH**-0.5
            weights = tl.exp(logits + bias - denominator[None, :])
            grad_values += tl.dot(weights.to(grads.dtype), grads, input_precision="ieee")
            grad_weights = tl.dot(values, tl.trans(grads), input_precision="ieee")
            if WHOLE:
                mean = tl.sum(weights * grad_weights, axis=0)
                if STEPS == 0:
                    tl.store(delta + line + rows, mean, mask=there)
            else:
                mean = tl.load(delta + line + rows, mask=there, other=0.0)
            grad_logits = weights * (grad_weights - mean[None, :])
            if COSINE and WHOLE:
                part = tl.sum(grad_logits * cosines, axis=0)
                tl.store(grad_scale + line + rows, part, mask=there)
            grad_bias = _add_at(grad_bias, start // BLOCK_N, grad_logits, STEPS)
            if COSINE:
                grad_logits = grad_logits * factor[None, :]
                grad_along += tl.sum(grad_logits, axis=1)
                scaled = grad_logits * inverse[None, :]
            else:
                grad_logits = grad_logits * WIDTH**-0.5
                scaled = grad_logits
            grad_keys += tl.dot(scaled.to(queries.dtype), queries, input_precision="ieee")
            if WHOLE:
                if COSINE:
                    grad_logits = grad_logits * column[:, None]
                turned = tl.trans(grad_logits.to(keys.dtype))
                total = tl.dot(turned, keys, input_precision="ieee")
                _store_query_gradients(
                    grad_queries_at, total, queries, inverse, rows, num_queries, q_stride,
                    COSINE, WIDTH, BLOCK_D,
                )  # fmt: skip
        if COSINE:
            # Read again: there are no registers to keep them in float32 all along.
            keys = _load_tokens(k + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            unit = keys.to(tl.float32) * column[:, None]
            grad_constant += tl.sum(unit * grad_along[:, None], axis=0)
            grad_keys = _unit_gradient(
                grad_keys + grad_along[:, None] * constant[None, :], unit, column
            )
        _store_tokens(grad_k + key_place, grad_keys, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
        _store_tokens(grad_v + key_place, grad_values, columns, num_keys, kv_stride, WIDTH, BLOCK_D)

    if STEPS > 0:
        grad_table = grad_table + (group * num_heads + head).to(tl.int64) * num_queries * num_keys
    for step in tl.static_range(STEPS):
        rows = step * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < num_queries)[None, :] & (columns < num_keys)[:, None]
        places = rows[None, :] * num_keys + columns[:, None]
        tl.store(grad_table + places, grad_bias[step], mask=inside)
    if COSINE:
        place = ((group * tl.num_programs(0) + tl.program_id(0)) * num_heads + head) * WIDTH
        channels = tl.arange(0, BLOCK_D)
        tl.store(grad_embedding + place + channels, grad_constant, mask=channels < WIDTH)


@triton.jit
def table_gradients_kernel(
    grad,
    q,
    k,
    v,
    table,
    embedding,
    scale,
    lse,
    delta,
    grad_table,
    batch,
    images,
    num_queries,
    num_keys,
    q_stride,
    kv_stride,
    COSINE: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
    constant = _load_embedding(embedding, head, COSINE, WIDTH, BLOCK_D)
    totals = ()
    for _ in tl.static_range(STEPS):
        totals = totals + (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
    for turn in tl.range(
        group * images, tl.minimum((group + 1) * images, batch), disable_licm=True
    ):
        image = tl.cast(turn, tl.int64)
        line = (image * num_heads + head) * num_queries
        grads_at = grad + image * num_queries * width + head * WIDTH
        queries_at = q + image * num_queries * q_stride + head * WIDTH
        key_place = image * num_keys * kv_stride + head * WIDTH
        grads = _load_tokens(grads_at, rows, num_queries, width, WIDTH, BLOCK_D)
        queries = _load_tokens(queries_at, rows, num_queries, q_stride, WIDTH, BLOCK_D)
        denominator = tl.load(lse + line + rows, mask=there, other=float("inf"))
        mean = tl.load(delta + line + rows, mask=there, other=0.0)
        factor, inverse = _query_factors(queries, scale, rows, num_queries, COSINE)
        for start in tl.range(0, STEPS * BLOCK_M, BLOCK_M, disable_licm=True):
            columns = first + start + tl.arange(0, BLOCK_M)
            keys = _load_tokens(k + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            values = _load_tokens(v + key_place, columns, num_keys, kv_stride, WIDTH, BLOCK_D)
            column, along = _key_factors(keys, constant, COSINE)
            bias = _load_table(table, rows, columns, num_queries, num_keys)
            logits = _cosines(queries, keys, inverse, column, along, COSINE, WIDTH)
            if COSINE:
                logits = logits * factor[:, None]
            weights = tl.exp(logits + bias - denominator[:, None])
            grad_weights = tl.dot(grads, tl.trans(values), input_precision="ieee")
            totals = _add_at(
                totals, start // BLOCK_M, weights * (grad_weights - mean[:, None]), STEPS
            )
    grad_table = grad_table + (group * num_heads + head).to(tl.int64) * num_queries * num_keys
    for step in tl.static_range(STEPS):
        columns = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = there[:, None] & (columns < num_keys)[None, :]
        places = rows[:, None] * num_keys + columns[None, :]
        tl.store(grad_table + places, totals[step], mask=inside)


@triton.jit
def _add_at(totals, place, value, COUNT: tl.constexpr):
    """Add to one of some tiles in registers, where the place is not known to the compiler."""
    sums = ()
    for i in tl.static_range(COUNT):
        sums = sums + (totals[i] + tl.where(place == i, value, 0.0),)
    return sums


@triton.jit
def _load_tokens(start, rows, count, stride, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (channels < WIDTH)[None, :]
    return tl.load(start + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tokens(start, tokens, rows, count, stride, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (channels < WIDTH)[None, :]
    tl.store(start + rows[:, None] * stride + channels[None, :], tokens, mask=inside)


@triton.jit
def _load_table(table, rows, columns, num_queries, num_keys):
    inside = (rows < num_queries)[:, None] & (columns < num_keys)[None, :]
    return tl.load(table + rows[:, None] * num_keys + columns[None, :], mask=inside, other=NEVER)


@triton.jit
def _load_embedding(
    embedding, head, COSINE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A head's query embedding, if logits are cosines."""
    constant = 0.0
    if COSINE:
        channels = tl.arange(0, BLOCK_D)
        constant = tl.load(embedding + head * WIDTH + channels, mask=channels < WIDTH, other=0.0)
    return constant


@triton.jit
def _query_factors(queries, scale, rows, num_queries, COSINE: tl.constexpr):
    """What logits are multiplied by, and the inverse lengths."""
    factor = 1.0
    inverse = 1.0
    if COSINE:
        factor = tl.load(scale + rows, mask=rows < num_queries, other=0.0)
        inverse = _inverse_length(queries)
    return factor, inverse


@triton.jit
def _key_factors(keys, constant, COSINE: tl.constexpr):
    """The inverse lengths, and the query embedding · unit keys."""
    inverse = 1.0
    along = 0.0
    if COSINE:
        inverse = _inverse_length(keys)
        along = tl.sum(keys.to(tl.float32) * constant[None, :], axis=1) * inverse
    return inverse, along


@triton.jit
def _inverse_length(tokens):
    wide = tokens.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), 1e-12)


@triton.jit
def _cosines(queries, keys, inverse, column, along, COSINE: tl.constexpr, WIDTH: tl.constexpr):
    """The logits before scale and bias: (q̂ + embedding) · k̂, or the scaled dot products."""
    products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if COSINE:
        return products * inverse[:, None] * column[None, :] + along[None, :]
    return products * WIDTH**-0.5


@triton.jit
def _store_query_gradients(
    start,
    total,
    queries,
    inverse,
    rows,
    num_queries,
    stride,
    COSINE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if COSINE:
        total = _unit_gradient(total, queries.to(tl.float32) * inverse[:, None], inverse)
    _store_tokens(start, total, rows, num_queries, stride, WIDTH, BLOCK_D)


@triton.jit
def _unit_gradient(grad, unit, inverse):
    """The gradient of tokens by that of the same at length one; a length at its floor is fixed."""
    along = tl.where(inverse < 1e12, tl.sum(unit * grad, axis=1), 0.0)
    return (grad - unit * along[:, None]) * inverse[:, None]
