"""Kernels of aggregated attention.

A program owns one head of an image's columns in a strip, and walks down it, row by row. Columns are
sixteen to a strip, of which those at its borders are only seen, by the windows of the others. The
rows that a window spans stay in registers, and so do the pooled tokens where they are few: each
pixel is loaded once by its own strip, and once more if it lies beside one.

Products are of the numbers as they are stored, so that a GPU computes them exactly before it adds
them up: lengths, temperature and query embedding come in afterwards, in float32. Maps [B, H, W, C]
are contiguous, the channels of a head side by side; all other tensors are float32.
"""

import triton
import triton.language as tl

# Columns of a strip: what a tensor core multiplies at least.
COLUMNS = tl.constexpr(16)


@triton.jit
def aggregated_attention_kernel(
    q,
    k,
    v,
    pool_k,
    pool_v,
    query_embedding,
    scale,
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
    WHOLE: tl.constexpr,
):
    """The mixed values, and the logarithm of each softmax's sum [B, h, N].

    Pooled tokens are taken `POOLED` at a time; `WHOLE` says that these are all.
    """
    REACH: tl.constexpr = WINDOW // 2
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lanes, channels, places = tl.arange(0, COLUMNS), tl.arange(0, WIDE), tl.arange(0, POOLED)
    columns = tl.program_id(0) * (COLUMNS - 2 * REACH) + lanes - REACH
    there = (columns >= 0) & (columns < width)
    own = there & (lanes >= REACH) & (lanes < COLUMNS - REACH)
    in_head = channels < HEAD
    stride = num_heads * HEAD
    pixels = columns[:, None] * stride + channels[None, :]
    start = image * height * width * stride + head * HEAD
    q, k, v, out = q + start, k + start, v + start, out + start
    log_sum += (image * num_heads + head) * height * width
    scale += head * height * width
    pool_bias += head * height * width * num_pooled
    seen, owned = there[:, None] & in_head[None, :], own[:, None] & in_head[None, :]
    pooled = image * num_pooled * stride + head * HEAD
    far_keys, far_values = pool_k + pooled + channels[None, :], pool_v + pooled + channels[None, :]
    far_key = _load_pooled(far_keys, places, num_pooled, stride, in_head)
    far_value = _load_pooled(far_values, places, num_pooled, stride, in_head)

    embedding = tl.load(query_embedding + head * HEAD + channels, mask=in_head, other=0.0)
    token = _load_tokens(tokens, head, channels, HEAD, WINDOW, SLOTS)
    # How many columns a key is right of a query's window's first.
    offset = lanes[None, :] - lanes[:, None] + REACH
    near = (offset >= 0) & (offset < WINDOW) & there[None, :]

    keys, values, lengths, embedded = (), (), (), ()
    for i in tl.static_range(WINDOW):
        key, value, length, along = _load_keys(
            k, v, pixels, i - REACH - 1, height, width, stride, seen, embedding
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
        sharpness = tl.load(scale + row * width + columns, mask=own, other=0.0)
        by_token = _token_weights(query, token) * inverse[:, None]

        # The window, a row of it at a time.
        logits = ()
        top = tl.full((COLUMNS,), -float("inf"), tl.float32)
        for i in tl.static_range(WINDOW):
            logit = _logits(query, inverse, sharpness, embedding, keys[i], lengths[i], embedded[i])
            logit += _by_offset(local_bias, head, offset, i, WINDOW)
            inside = near & (row + i >= REACH) & (row + i < height + REACH)
            logit = tl.where(inside, logit, -float("inf"))
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
            extra += _by_offset(token_bias, head, offset, i, WINDOW)
            added += _product(tl.where(near, extra, 0.0).to(value.dtype), values[i])

        biases = pool_bias + (row * width + columns[:, None]) * num_pooled
        for first in range(0, num_pooled, POOLED):
            index = first + places
            if not WHOLE:
                far_key = _load_pooled(far_keys, index, num_pooled, stride, in_head)
                far_value = _load_pooled(far_values, index, num_pooled, stride, in_head)
            far = _far_logits(query, inverse, sharpness, embedding, far_key, biases, index, num_pooled, own)
            higher = tl.maximum(top, tl.max(far, axis=1))
            share = tl.exp(far - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(share, axis=1)
            mixed = mixed * shrink[:, None] + _product(share.to(far_value.dtype), far_value)
            top = higher

        mixed = mixed / total[:, None] + added
        tl.store(out + pixels + row * width * stride, mixed, mask=owned)
        place = row * width + columns
        tl.store(log_sum + place, top + tl.log(total), mask=own)


@triton.jit
def aggregated_attention_gradients_kernel(
    grad,
    q,
    k,
    v,
    pool_k,
    pool_v,
    query_embedding,
    scale,
    local_bias,
    pool_bias,
    tokens,
    token_bias,
    log_sum,
    grad_q,
    grad_k,
    grad_v,
    grad_scale,
    inner,
    pool_sums,
    sums,
    height,
    width,
    num_heads,
    num_pooled,
    HEAD: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    POOLED: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Everything that follows from the gradient [B, H, W, C] of what the kernel above wrote.

    A key's gradient is gathered from all queries around it, which need their whole windows: so the
    columns only seen are twice as many here. `inner` [B, h, N] is, for each query, what its
    softmax's weights and their gradients come to, multiplied and added up.

    Parts of sums, one a program: `sums` [strips, B, h, ...] of the gradients of tokens, their bias,
    the local bias and query embedding, one after the other; `pool_sums`
    [2, strips, B, M, C] of those of pooled unit keys and values, where all are in registers at once
    (`WHOLE`).
    """
    REACH: tl.constexpr = WINDOW // 2
    AREA: tl.constexpr = WINDOW * WINDOW
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lanes, channels, places = tl.arange(0, COLUMNS), tl.arange(0, WIDE), tl.arange(0, POOLED)
    columns = tl.program_id(0) * (COLUMNS - 4 * REACH) + lanes - 2 * REACH
    there = (columns >= 0) & (columns < width)
    asking = there & (lanes >= REACH) & (lanes < COLUMNS - REACH)
    own = there & (lanes >= 2 * REACH) & (lanes < COLUMNS - 2 * REACH)
    in_head = channels < HEAD
    stride = num_heads * HEAD
    pixels = columns[:, None] * stride + channels[None, :]
    start = image * height * width * stride + head * HEAD
    grad, q, k, v = grad + start, q + start, k + start, v + start
    grad_q, grad_k, grad_v = grad_q + start, grad_k + start, grad_v + start
    by_query = (image * num_heads + head) * height * width
    log_sum, grad_scale, inner = log_sum + by_query, grad_scale + by_query, inner + by_query
    scale += head * height * width
    pool_bias += head * height * width * num_pooled
    seen, owned = there[:, None] & in_head[None, :], own[:, None] & in_head[None, :]
    pooled = image * num_pooled * stride + head * HEAD
    far_keys, far_values = pool_k + pooled + channels[None, :], pool_v + pooled + channels[None, :]
    held_keys, held_values = (), ()
    grad_far_keys, grad_far_values, grad_far_alongs = (), (), ()
    for c in tl.static_range(CHUNKS):
        index = c * POOLED + places
        held_keys = held_keys + (_load_pooled(far_keys, index, num_pooled, stride, in_head),)
        held_values = held_values + (_load_pooled(far_values, index, num_pooled, stride, in_head),)
        grad_far_keys = grad_far_keys + (tl.zeros((POOLED, WIDE), tl.float32),)
        grad_far_values = grad_far_values + (tl.zeros((POOLED, WIDE), tl.float32),)
        grad_far_alongs = grad_far_alongs + (tl.zeros((POOLED,), tl.float32),)

    embedding = tl.load(query_embedding + head * HEAD + channels, mask=in_head, other=0.0)
    slots = tl.arange(0, SLOTS)

    token = _load_tokens(tokens, head, channels, HEAD, WINDOW, SLOTS)
    # Of pairs, keys come first here. How many columns a key is right of a query's window's first:
    offset = lanes[:, None] - lanes[None, :] + REACH
    token_constant = tl.load(token_bias + head * AREA + slots, mask=slots < AREA, other=0.0)
    local_constant = tl.load(local_bias + head * AREA + slots, mask=slots < AREA, other=0.0)
    bias_by_slot = tl.broadcast_to(local_constant[:, None], (SLOTS, COLUMNS))
    near = (offset >= 0) & (offset < WINDOW) & there[:, None]
    # Of each query, the lane in which a slot of its window is.
    slot_lanes = _clamp(lanes[None, :] + slots[:, None] % WINDOW - REACH, COLUMNS)

    keys, values, lengths, embedded = (), (), (), ()
    # What of a key's gradient lies along the embedding is kept apart, as one number.
    grad_keys, grad_values, grad_alongs = (), (), ()
    for i in tl.static_range(WINDOW):
        key, value, length, along = _load_keys(
            k, v, pixels, i - REACH - 1, height, width, stride, seen, embedding
        )
        keys, values = keys + (key,), values + (value,)
        lengths, embedded = lengths + (length,), embedded + (along,)
        grad_keys = grad_keys + (tl.zeros((COLUMNS, WIDE), tl.float32),)
        grad_values = grad_values + (tl.zeros((COLUMNS, WIDE), tl.float32),)
        grad_alongs = grad_alongs + (tl.zeros((COLUMNS,), tl.float32),)
    grad_tokens = tl.zeros((SLOTS, WIDE), tl.float32)
    grad_token_bias = tl.zeros((SLOTS,), tl.float32)
    grad_local_bias = tl.zeros((SLOTS,), tl.float32)
    grad_embedding = tl.zeros((WIDE,), tl.float32)

    for row in tl.range(0, height + REACH, disable_licm=True):
        # Below the map nothing is asked, and the last rows' gradients are written.
        key, value, length, along = _load_keys(
            k, v, pixels, row + REACH, height, width, stride, seen, embedding
        )
        keys, values = _next(keys, key, WINDOW), _next(values, value, WINDOW)
        lengths, embedded = _next(lengths, length, WINDOW), _next(embedded, along, WINDOW)
        nothing = tl.zeros((COLUMNS, WIDE), tl.float32)
        grad_keys = _next(grad_keys, nothing, WINDOW)
        grad_values = _next(grad_values, nothing, WINDOW)
        grad_alongs = _next(grad_alongs, tl.zeros((COLUMNS,), tl.float32), WINDOW)

        in_map = seen & (row < height)
        step = row * width * stride
        query = tl.load(q + pixels + step, mask=in_map, other=0.0)
        given = tl.load(grad + pixels + step, mask=in_map, other=0.0)
        place = row * width + columns
        asked = asking & (row < height)
        peak = tl.load(log_sum + place, mask=asked, other=float("inf"))
        inverse = _inverse_length(query)
        sharpness = tl.load(scale + row * width + columns, mask=asked, other=0.0)
        turned_query, turned_given = tl.trans(query), tl.trans(given)
        by_token = _mix(token, turned_query) * inverse[None, :] + token_constant[:, None]

        weights, weight_grads = (), ()
        total = tl.zeros((COLUMNS,), tl.float32)
        by_slot = tl.zeros((SLOTS, COLUMNS), tl.float32)
        added = ()
        for i in tl.static_range(WINDOW):
            products = _product(keys[i], turned_query) * inverse[None, :] + embedded[i][:, None]
            logit = products * lengths[i][:, None] * sharpness[None, :]
            slot = _clamp(offset, WINDOW) + i * WINDOW
            logit += tl.gather(bias_by_slot, slot, axis=0)
            inside = near & (row + i >= REACH) & (row + i < height + REACH)
            weight = tl.where(inside, tl.exp(logit - peak[None, :]), 0.0)
            weight_grad = _product(values[i], turned_given)
            total += tl.sum(weight * weight_grad, axis=0)
            extra = tl.gather(by_token, slot, axis=0)
            mixed = weight + tl.where(inside & asked[None, :], extra, 0.0)
            added = added + (grad_values[i] + _mix(mixed, given),)
            in_slot = own[None, :] & (slots[:, None] // WINDOW == i)
            by_slot += tl.where(in_slot, tl.gather(weight_grad, slot_lanes, axis=0), 0.0)
            weights, weight_grads = weights + (weight,), weight_grads + (weight_grad,)
        grad_values = added

        biases = pool_bias + (row * width + columns[None, :]) * num_pooled
        shares = ()
        if CHUNKS > 0:
            for c in tl.static_range(CHUNKS):
                share = _far_weights(
                    turned_query, inverse, sharpness, embedding, held_keys[c], biases,
                    c * POOLED + places, num_pooled, asked, peak,
                )
                total += tl.sum(share * _product(held_values[c], turned_given), axis=0)
                shares = shares + (share,)
        else:
            for first in range(0, num_pooled, POOLED):
                index = first + places
                near_key = _load_pooled(far_keys, index, num_pooled, stride, in_head)
                near_value = _load_pooled(far_values, index, num_pooled, stride, in_head)
                part = _far_weights(
                    turned_query, inverse, sharpness, embedding, near_key, biases, index,
                    num_pooled, asked, peak,
                )
                total += tl.sum(part * _product(near_value, turned_given), axis=0)
        tl.store(inner + place, total, mask=own & (row < height))

        # The gradient of a unit query with its embedding, scaled.
        grad_query = tl.zeros((COLUMNS, WIDE), tl.float32)
        factor = sharpness * inverse
        added, alongs = (), ()
        for i in tl.static_range(WINDOW):
            logit_grad = weights[i] * (weight_grads[i] - total[None, :])
            grad_query += _mix(tl.trans(logit_grad * lengths[i][:, None]), keys[i])
            added = added + (grad_keys[i] + _mix(logit_grad * factor[None, :], query),)
            alongs = alongs + (grad_alongs[i] + tl.sum(logit_grad * sharpness[None, :], axis=1),)
            in_slot = own[None, :] & (slots[:, None] // WINDOW == i)
            grad_slots = tl.where(in_slot, tl.gather(logit_grad, slot_lanes, axis=0), 0.0)
            grad_local_bias += tl.sum(grad_slots, axis=1)
        grad_keys, grad_alongs = added, alongs
        if CHUNKS > 0:
            key_sums, value_sums, along_sums = (), (), ()
            for c in tl.static_range(CHUNKS):
                share = tl.where(own[None, :], shares[c], 0.0)
                far_grad = share * (_product(held_values[c], turned_given) - total[None, :])
                far_length = _inverse_length(held_keys[c])
                grad_query += _mix(tl.trans(far_grad * far_length[:, None]), held_keys[c])
                key_sums = key_sums + (
                    grad_far_keys[c] + _mix(far_grad * factor[None, :], query),
                )
                value_sums = value_sums + (grad_far_values[c] + _mix(share, given),)
                along_sums = along_sums + (
                    grad_far_alongs[c] + tl.sum(far_grad * sharpness[None, :], axis=1),
                )
            grad_far_keys, grad_far_values, grad_far_alongs = key_sums, value_sums, along_sums
        else:
            for first in range(0, num_pooled, POOLED):
                index = first + places
                near_key = _load_pooled(far_keys, index, num_pooled, stride, in_head)
                near_value = _load_pooled(far_values, index, num_pooled, stride, in_head)
                part = _far_weights(
                    turned_query, inverse, sharpness, embedding, near_key, biases, index,
                    num_pooled, asked, peak,
                )
                part_grad = part * (_product(near_value, turned_given) - total[None, :])
                near_length = _inverse_length(near_key)
                grad_query += _mix(tl.trans(part_grad * near_length[:, None]), near_key)

        grad_query = tl.where(owned, grad_query, 0.0)
        unit = query.to(tl.float32) * inverse[:, None]
        grad_embedding += tl.sum(grad_query * sharpness[:, None], axis=0)
        turned = tl.sum(grad_query * (unit + embedding[None, :]), axis=1)
        tl.store(grad_scale + place, turned, mask=own & (row < height))
        grad_tokens += _mix(by_slot * inverse[None, :], query)
        grad_token_bias += tl.sum(by_slot, axis=1)
        grad_unit = grad_query * sharpness[:, None] + _wide_product(tl.trans(by_slot), token, query.dtype)
        grad_query = _unit_backward(unit, grad_unit, inverse)
        tl.store(grad_q + pixels + step, grad_query, mask=owned & (row < height))

        written = owned & (row >= REACH)
        step = (row - REACH) * width * stride
        unit = keys[0].to(tl.float32) * lengths[0][:, None]
        grad_key = grad_keys[0] + grad_alongs[0][:, None] * embedding[None, :]
        tl.store(grad_k + pixels + step, _unit_backward(unit, grad_key, lengths[0]), mask=written)
        tl.store(grad_v + pixels + step, grad_values[0], mask=written)

    start = (tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)) * num_heads + head
    sums += start.to(tl.int64) * (HEAD * AREA + 2 * AREA + HEAD)
    in_window = slots < AREA
    place = channels[None, :] * AREA + slots[:, None]
    tl.store(sums + place, grad_tokens, mask=in_head[None, :] & in_window[:, None])
    sums += HEAD * AREA
    tl.store(sums + slots, grad_token_bias, mask=in_window)
    tl.store(sums + AREA + slots, grad_local_bias, mask=in_window)
    tl.store(sums + 2 * AREA + channels, grad_embedding, mask=in_head)
    for c in tl.static_range(CHUNKS):
        index = c * POOLED + places[:, None]
        part = tl.program_id(0) * tl.num_programs(2) + image
        place = (part * num_pooled + index) * stride + head * HEAD + channels[None, :]
        is_far = (index < num_pooled) & in_head[None, :]
        grad_far_key = grad_far_keys[c] + grad_far_alongs[c][:, None] * embedding[None, :]
        tl.store(pool_sums + place, grad_far_key, mask=is_far)
        size = tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * num_pooled * stride
        tl.store(pool_sums + size + place, grad_far_values[c], mask=is_far)


@triton.jit
def _load_keys(k, v, pixels, row, height, width, stride, seen, embedding):
    """A row's keys and values, the keys' inverse lengths, and their products with the embedding."""
    mask = seen & (row >= 0) & (row < height)
    key = tl.load(k + pixels + row * width * stride, mask=mask, other=0.0)
    value = tl.load(v + pixels + row * width * stride, mask=mask, other=0.0)
    along = tl.sum(key.to(tl.float32) * embedding[None, :], axis=1)
    return key, value, _inverse_length(key), along


@triton.jit
def _load_pooled(start, index, num_pooled, stride, in_head):
    mask = (index[:, None] < num_pooled) & in_head[None, :]
    return tl.load(start + index[:, None] * stride, mask=mask, other=0.0)


@triton.jit
def _load_tokens(tokens, head, channels, HEAD: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr):
    """A head's tokens [window², d], filled up with zeros."""
    slots = tl.arange(0, SLOTS)
    mask = (channels[None, :] < HEAD) & (slots[:, None] < WINDOW * WINDOW)
    places = (head * HEAD + channels[None, :]) * WINDOW * WINDOW + slots[:, None]
    return tl.load(tokens + places, mask=mask, other=0.0)


@triton.jit
def _logits(query, inverse, sharpness, embedding, key, length, along):
    """Unit queries with the embedding, scaled, times unit keys."""
    products = _product(query, tl.trans(key)) * inverse[:, None] + along[None, :]
    return products * length[None, :] * sharpness[:, None]


@triton.jit
def _far_logits(query, inverse, sharpness, embedding, key, biases, index, num_pooled, asked):
    """The same for pooled keys, with their bias; -inf beyond the last."""
    along = tl.sum(key.to(tl.float32) * embedding[None, :], axis=1)
    logit = _logits(query, inverse, sharpness, embedding, key, _inverse_length(key), along)
    is_key = index[None, :] < num_pooled
    logit += tl.load(biases + index[None, :], mask=asked[:, None] & is_key, other=0.0)
    return tl.where(is_key, logit, -float("inf"))


@triton.jit
def _far_weights(
    turned_query, inverse, sharpness, embedding, key, biases, index, num_pooled, asked, peak
):
    """The softmax's weights of pooled keys, which come first, and queries."""
    along = tl.sum(key.to(tl.float32) * embedding[None, :], axis=1)
    products = _product(key, turned_query) * inverse[None, :] + along[:, None]
    logit = products * _inverse_length(key)[:, None] * sharpness[None, :]
    is_key = index[:, None] < num_pooled
    logit += tl.load(biases + index[:, None], mask=asked[None, :] & is_key, other=0.0)
    return tl.where(is_key, tl.exp(logit - peak[None, :]), 0.0)


@triton.jit
def _token_weights(query, token):
    """Queries times a head's tokens [window²]."""
    return tl.trans(_mix(token, tl.trans(query)))


@triton.jit
def _by_offset(table, head, offset, row: tl.constexpr, WINDOW: tl.constexpr):
    """Of a table [h, window²], each pair's entry by how far apart the two are; 0 beyond the window."""
    entry = tl.zeros(offset.shape, tl.float32)
    for j in tl.static_range(WINDOW):
        entry = tl.where(offset == j, tl.load(table + (head * WINDOW + row) * WINDOW + j), entry)
    return entry


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
def _unit_backward(unit, grad, inverse):
    """From the gradient of unit vectors to that of the vectors; the least length is a constant."""
    along = tl.where(inverse < 1e12, tl.sum(unit * grad, axis=1), 0.0)
    return (grad - unit * along[:, None]) * inverse[:, None]


@triton.jit
def _product(a, b):
    """A product of numbers as stored."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _mix(weights, x):
    """float32 weights times numbers as stored, without rounding the weights to their dtype."""
    if x.dtype == tl.bfloat16:
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, x) + tl.dot(low, x)
    elif x.dtype == tl.float16:
        # Their range is too small for weights.
        return tl.dot(weights, x.to(tl.float32), input_precision="bf16x3")
    else:
        return tl.dot(weights, x, input_precision="ieee")


@triton.jit
def _wide_product(a, b, dtype):
    """A product of float32 numbers, on tensor cores where maps are of another dtype."""
    if dtype == tl.float32:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="bf16x3")


@triton.jit
def _clamp(x, COUNT: tl.constexpr):
    return tl.minimum(tl.maximum(x, 0), COUNT - 1)
