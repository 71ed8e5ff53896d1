"""The kernel of the gradients of aggregated attention, by strips as that is."""

import triton
import triton.language as tl

from .aggregated_attention import (
    COLUMNS,
    advance,
    clamp,
    far_logits,
    load_keys,
    load_learned,
    mix,
    narrow,
    product,
)
from .attention import inverse_length, load_embedding, load_tokens, unit_gradient


@triton.jit
def aggregated_attention_gradients_kernel(
    grad, q, k, v, pool_k, pool_v, query_embedding, scale, tokens, token_bias, local_bias,
    pool_bias, log_sum, grad_q, grad_k, grad_v, grad_scale, inner, pool_sums, sums,
    height, width, num_heads, num_pooled,
    HEAD: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr,
    POOLED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of maps and scales [B, h, N], and parts of those of all else.

    A key's gradient is gathered from all queries around it, which need their whole windows: so the
    columns only seen are twice as many here. `inner` [B, h, N] is, for each query, its softmax's
    weights times their gradients, added up: what the gradients of its logits are measured from.

    A program writes a part of `sums` [strips, B, h, ...], of the gradients of tokens, their bias,
    the local bias and the query embedding, one after the other; and, where pooled tokens are
    `WHOLE`, all at once, of `pool_sums` [2, strips, B, M, C], of pooled keys of length one and of
    pooled values.
    """
    REACH: tl.constexpr = WINDOW // 2
    AREA: tl.constexpr = WINDOW * WINDOW
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lanes, channels, places = tl.arange(0, COLUMNS), tl.arange(0, WIDE), tl.arange(0, POOLED)
    slots = tl.arange(0, SLOTS)
    columns = tl.program_id(0) * (COLUMNS - 4 * REACH) + lanes - 2 * REACH
    there = (columns >= 0) & (columns < width)
    asking = there & (lanes >= REACH) & (lanes < COLUMNS - REACH)
    own = there & (lanes >= 2 * REACH) & (lanes < COLUMNS - 2 * REACH)
    in_head = channels < HEAD
    stride = num_heads * HEAD
    num_queries = height * width
    pixels = columns[:, None] * stride + channels[None, :]
    start = image * num_queries * stride + head * HEAD
    grad, q, k, v = grad + start, q + start, k + start, v + start
    grad_q, grad_k, grad_v = grad_q + start, grad_k + start, grad_v + start
    line = (image * num_heads + head) * num_queries
    log_sum, grad_scale, inner = log_sum + line, grad_scale + line, inner + line
    scale += head * num_queries
    pool_bias += head * num_queries * num_pooled
    seen, owned = there[:, None] & in_head[None, :], own[:, None] & in_head[None, :]
    pooled = image * num_pooled * stride + head * HEAD
    pool_k, pool_v = pool_k + pooled, pool_v + pooled
    if WHOLE:
        far_key = load_tokens(pool_k, places, num_pooled, stride, HEAD, WIDE)
        far_value = load_tokens(pool_v, places, num_pooled, stride, HEAD, WIDE)
        grad_far_keys = tl.zeros((WIDE, POOLED), tl.float32)
        grad_far_values = tl.zeros((WIDE, POOLED), tl.float32)

    embedding = load_embedding(query_embedding, head, True, HEAD, WIDE)
    token = load_learned(tokens, head, channels, HEAD, WINDOW, SLOTS)
    token_constant = tl.load(token_bias + head * AREA + slots, mask=slots < AREA, other=0.0)
    local_constant = tl.load(local_bias + head * AREA + slots, mask=slots < AREA, other=0.0)
    constant = tl.broadcast_to(local_constant[:, None], (SLOTS, COLUMNS))
    # Of a window's pairs, keys come first. How many columns they are right of the window's first:
    offset = lanes[:, None] - lanes[None, :] + REACH
    near = (offset >= 0) & (offset < WINDOW) & there[:, None]
    # Of each query, the lanes in which its window's slots are, and their rows, if it is its own.
    slot_lanes = clamp(lanes[None, :] + slots[:, None] % WINDOW - REACH, COLUMNS)
    slot_rows = tl.where(own[None, :], slots[:, None] // WINDOW, -1)

    keys, values, lengths, embedded = (), (), (), ()
    grad_keys, grad_values = (), ()
    nothing = tl.zeros((COLUMNS, WIDE), tl.float32)
    for i in tl.static_range(WINDOW):
        key, value, length, along = load_keys(
            k, v, pixels, i - REACH - 1, height, width, stride, seen, embedding
        )
        keys, values = keys + (key,), values + (value,)
        lengths, embedded = lengths + (length,), embedded + (along,)
        grad_keys, grad_values = grad_keys + (nothing,), grad_values + (nothing,)
    grad_tokens = tl.zeros((SLOTS, WIDE), tl.float32)
    grad_token_bias = tl.zeros((SLOTS,), tl.float32)
    grad_local_bias = tl.zeros((SLOTS,), tl.float32)
    grad_embedding = tl.zeros((WIDE,), tl.float32)

    for row in tl.range(0, height + REACH, disable_licm=True):
        # Below the map nothing is asked, and the last rows' gradients are written.
        key, value, length, along = load_keys(
            k, v, pixels, row + REACH, height, width, stride, seen, embedding
        )
        keys, values = advance(keys, key, WINDOW), advance(values, value, WINDOW)
        lengths, embedded = advance(lengths, length, WINDOW), advance(embedded, along, WINDOW)
        grad_keys = advance(grad_keys, nothing, WINDOW)
        grad_values = advance(grad_values, nothing, WINDOW)

        place = pixels + row * width * stride
        asked = asking & (row < height)
        query = tl.load(q + place, mask=asked[:, None] & in_head[None, :], other=0.0)
        given = tl.load(grad + place, mask=asked[:, None] & in_head[None, :], other=0.0)
        rows = tl.where(asked, row * width + columns, num_queries)
        peak = tl.load(log_sum + rows, mask=asked, other=float("inf"))
        sharpness = tl.load(scale + rows, mask=asked, other=0.0)
        inverse = inverse_length(query)
        by_token = mix(token, tl.trans(query)) * inverse[None, :] + token_constant[:, None]

        weights, weight_grads, grad_values, by_slot, total = _window_weights(
            grad_values, keys, values, lengths, embedded, query, given, inverse, sharpness, peak,
            by_token, constant, near, offset, slot_lanes, slot_rows, row, height, WINDOW,
        )  # fmt: skip
        if WHOLE:
            share = _far_weights(
                query, inverse, sharpness, peak, embedding, far_key, pool_bias, rows, places,
                num_queries, num_pooled,
            )  # fmt: skip
            total += tl.sum(share * product(given, tl.trans(far_value)), axis=1)
        else:
            for first in range(0, num_pooled, POOLED):
                index = first + places
                near_key = load_tokens(pool_k, index, num_pooled, stride, HEAD, WIDE)
                near_value = load_tokens(pool_v, index, num_pooled, stride, HEAD, WIDE)
                part = _far_weights(
                    query, inverse, sharpness, peak, embedding, near_key, pool_bias, rows, index,
                    num_queries, num_pooled,
                )  # fmt: skip
                total += tl.sum(part * product(given, tl.trans(near_value)), axis=1)
        tl.store(inner + rows, total, mask=own & asked)

        unit = query.to(tl.float32) * inverse[:, None]
        asking_for = (unit + embedding[None, :]).to(query.dtype)
        grad_query, grad_keys, grad_local_bias = _window_gradients(
            grad_keys, grad_local_bias, weights, weight_grads, total, keys, lengths, asking_for,
            sharpness, slot_lanes, slot_rows, WINDOW,
        )  # fmt: skip
        if WHOLE:
            share = tl.where(own[:, None], share, 0.0)
            share_grad = share * (product(given, tl.trans(far_value)) - total[:, None])
            grad_query += _mix_finely(share_grad * inverse_length(far_key)[None, :], far_key)
            share_grad = narrow(share_grad * sharpness[:, None], query.dtype)
            grad_far_keys += product(tl.trans(asking_for), share_grad)
            grad_far_values += product(tl.trans(given), narrow(share, query.dtype))
        else:
            for first in range(0, num_pooled, POOLED):
                index = first + places
                near_key = load_tokens(pool_k, index, num_pooled, stride, HEAD, WIDE)
                near_value = load_tokens(pool_v, index, num_pooled, stride, HEAD, WIDE)
                part = _far_weights(
                    query, inverse, sharpness, peak, embedding, near_key, pool_bias, rows, index,
                    num_queries, num_pooled,
                )  # fmt: skip
                part *= product(given, tl.trans(near_value)) - total[:, None]
                grad_query += _mix_finely(part * inverse_length(near_key)[None, :], near_key)

        # So far it is that of a unit query with its embedding, scaled.
        grad_query = tl.where(owned, grad_query, 0.0)
        part = tl.sum(grad_query * (unit + embedding[None, :]), axis=1)
        tl.store(grad_scale + rows, part, mask=own & asked)
        grad_query *= sharpness[:, None]
        grad_embedding += tl.sum(grad_query, axis=0)
        grad_tokens += mix(by_slot * inverse[None, :], query)
        grad_token_bias += tl.sum(by_slot, axis=1)
        grad_query += _wide_product(tl.trans(by_slot), token, query.dtype)
        grad_query = unit_gradient(grad_query, unit, inverse)
        tl.store(grad_q + place, grad_query, mask=owned & (row < height))

        place = pixels + (row - REACH) * width * stride
        written = owned & (row >= REACH)
        unit = keys[0].to(tl.float32) * lengths[0][:, None]
        tl.store(grad_k + place, unit_gradient(grad_keys[0], unit, lengths[0]), mask=written)
        tl.store(grad_v + place, grad_values[0], mask=written)

    part = (tl.program_id(0) * tl.num_programs(2) + image) * num_heads + head
    sums += part * (HEAD * AREA + 2 * AREA + HEAD)
    in_window = slots < AREA
    learned = channels[None, :] * AREA + slots[:, None]
    tl.store(sums + learned, grad_tokens, mask=in_head[None, :] & in_window[:, None])
    sums += HEAD * AREA
    tl.store(sums + slots, grad_token_bias, mask=in_window)
    tl.store(sums + AREA + slots, grad_local_bias, mask=in_window)
    tl.store(sums + 2 * AREA + channels, grad_embedding, mask=in_head)
    if WHOLE:
        part = tl.program_id(0) * tl.num_programs(2) + image
        far = (part * num_pooled + places[None, :]) * stride + head * HEAD + channels[:, None]
        is_far = (places < num_pooled)[None, :] & in_head[:, None]
        tl.store(pool_sums + far, grad_far_keys, mask=is_far)
        parts = tl.num_programs(0).to(tl.int64) * tl.num_programs(2)
        pool_sums += parts * num_pooled * stride
        tl.store(pool_sums + far, grad_far_values, mask=is_far)


@triton.jit
def _window_weights(
    grad_values, keys, values, lengths, embedded, query, given, inverse, sharpness, peak, by_token,
    constant, near, offset, slot_lanes, slot_rows, row, height, WINDOW: tl.constexpr,
):  # fmt: skip
    """The weights of a window's keys, and their gradients; add to the gradients of its values.

    Also, of each query, the weights' gradients by slot, and what they and the weights come to,
    multiplied and added up.
    """
    REACH: tl.constexpr = WINDOW // 2
    turned_query, turned_given = tl.trans(query), tl.trans(given)
    weights, weight_grads, sums_of_values = (), (), ()
    total = tl.zeros(query.shape[:1], tl.float32)
    by_slot = tl.zeros(slot_rows.shape, tl.float32)
    for i in tl.static_range(WINDOW):
        cosine = product(keys[i], turned_query) * lengths[i][:, None] * inverse[None, :]
        logit = (cosine + embedded[i][:, None]) * sharpness[None, :]
        slot = clamp(offset, WINDOW) + i * WINDOW
        logit += tl.gather(constant, slot, axis=0)
        inside = near & (row + i >= REACH) & (row + i < height + REACH)
        weight = tl.where(inside, tl.exp(logit - peak[None, :]), 0.0)
        weight_grad = product(values[i], turned_given)
        total += tl.sum(weight * weight_grad, axis=0)
        mixed = weight + tl.where(inside, tl.gather(by_token, slot, axis=0), 0.0)
        sums_of_values = sums_of_values + (grad_values[i] + mix(mixed, given),)
        by_slot += tl.where(slot_rows == i, tl.gather(weight_grad, slot_lanes, axis=0), 0.0)
        weights, weight_grads = weights + (weight,), weight_grads + (weight_grad,)
    return weights, weight_grads, sums_of_values, by_slot, total


@triton.jit
def _far_weights(
    query, inverse, sharpness, peak, embedding, key, bias, rows, index, num_queries, num_pooled
):
    """The softmax's weights of pooled keys."""
    logit = far_logits(
        query, inverse, sharpness, embedding, key, bias, rows, index, num_queries, num_pooled
    )
    return tl.exp(logit - peak[:, None])


@triton.jit
def _window_gradients(
    grad_keys, grad_local_bias, weights, weight_grads, total, keys, lengths, asking_for, sharpness,
    slot_lanes, slot_rows, WINDOW: tl.constexpr,
):  # fmt: skip
    """What the window's logits add to the gradients of queries, of its keys and its bias."""
    grad_query = tl.zeros(asking_for.shape, tl.float32)
    sums_of_keys = ()
    for i in tl.static_range(WINDOW):
        logit_grad = weights[i] * (weight_grads[i] - total[None, :])
        grad_query += _mix_finely(tl.trans(logit_grad * lengths[i][:, None]), keys[i])
        sums_of_keys = sums_of_keys + (
            grad_keys[i] + mix(logit_grad * sharpness[None, :], asking_for),
        )
        by_slot = tl.where(slot_rows == i, tl.gather(logit_grad, slot_lanes, axis=0), 0.0)
        grad_local_bias += tl.sum(by_slot, axis=1)
    return grad_query, sums_of_keys, grad_local_bias


@triton.jit
def _mix_finely(weights, x):
    """The same as `mix`, with what rounding the weights leaves: sums over all queries show it."""
    mixed = mix(weights, x)
    if x.dtype != tl.float32:
        mixed += mix(weights - narrow(weights, x.dtype).to(tl.float32), x)
    return mixed


@triton.jit
def _wide_product(a, b, dtype):
    """A product of float32 numbers, on tensor cores where maps are of another dtype."""
    if dtype == tl.float32:
        wide = tl.dot(a, b, input_precision="ieee")
    else:
        wide = tl.dot(a, b, input_precision="tf32x3")
    return wide
