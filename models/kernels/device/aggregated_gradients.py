"""The kernel of the gradients of aggregated attention, by strips as that is.

A key's gradient is gathered from all queries around it, which need their whole windows: so the
columns only seen are twice as many here. What belongs together goes from function to function as a
tuple: `asker`, a row's queries with all that is known of them; `window`, what is the same for every
row of queries; `far`, where the pooled tokens are, and the first of them.
"""

import triton
import triton.language as tl

from .aggregated_attention import (
    COLUMNS,
    advance,
    clamp,
    far_logits,
    first_rows,
    load_learned,
    mix,
    next_rows,
    product,
)
from .attention import inverse_length, load_embedding, load_tokens, narrow, unit_gradient


@triton.jit
def aggregated_attention_gradients_kernel(
    grad, q, k, v, pool_k, pool_v, query_embedding, scale, tokens, token_bias, local_bias,
    pool_bias, log_sum, grad_q, grad_k, grad_v, grad_scale, inner, pool_sums, sums,
    height, width, num_heads, num_pooled,
    HEAD: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr,
    POOLED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of maps and scales, and parts of all else; `inner` is for the pooled keys' bias.

    `sums` [strips, B, h, ...]: of tokens, their bias, the local bias and the query embedding;
    `pool_sums` [2, strips, B, M, C], if pooled tokens are `WHOLE`: of unit keys, and of values.
    """
    REACH: tl.constexpr = WINDOW // 2
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lanes, channels, places = tl.arange(0, COLUMNS), tl.arange(0, WIDE), tl.arange(0, POOLED)
    columns, there, asking, own = _strip(lanes, width, REACH)
    in_head = (channels < HEAD)[None, :]
    stride, num_queries = num_heads * HEAD, height * width
    pixels = columns[:, None] * stride + channels[None, :]
    start, line = image * num_queries * stride, (image * num_heads + head) * num_queries
    owned, start = own[:, None] & in_head, start + head * HEAD
    pooled = image * num_pooled * stride + head * HEAD
    far = _far_tokens(
        pool_k + pooled, pool_v + pooled, pool_bias + head * num_queries * num_pooled, places,
        num_queries, num_pooled, stride, HEAD, WIDE,
    )  # fmt: skip
    far_sums = tl.zeros((WIDE, POOLED), tl.float32), tl.zeros((WIDE, POOLED), tl.float32)
    embedding = load_embedding(query_embedding, head, True, HEAD, WIDE)
    window = _window(
        tokens, token_bias, local_bias, head, lanes, channels, there, own, HEAD, WINDOW, SLOTS
    )
    keys_at = k + start, v + start, pixels, height, width, stride, there[:, None] & in_head
    keys, values, lengths, embedded = first_rows(keys_at, embedding, WINDOW)
    nothing = tl.zeros((COLUMNS, WIDE), tl.float32)
    grad_keys, grad_values = _repeated(nothing, WINDOW), _repeated(nothing, WINDOW)
    learned = tl.zeros((SLOTS, WIDE), tl.float32), tl.zeros((SLOTS,), tl.float32)
    grad_local_bias, grad_embedding = tl.zeros((SLOTS,), tl.float32), tl.zeros((WIDE,), tl.float32)

    for row in tl.range(0, height + REACH, disable_licm=True):
        # Below the map nothing is asked, and the last rows' gradients are written.
        keys, values, lengths, embedded = next_rows(
            keys, values, lengths, embedded, keys_at, row + REACH, embedding, WINDOW
        )
        grad_keys = advance(grad_keys, nothing, WINDOW)
        grad_values = advance(grad_values, nothing, WINDOW)
        place, asked = pixels + row * width * stride, asking & (row < height)
        rows = tl.where(asked, row * width + columns, num_queries)
        at = place, line + rows, head * num_queries + rows, asked
        asker = _asker(q + start, grad + start, scale, log_sum, at, in_head, rows)
        weights, weight_grads, grad_values, by_slot, total = _window_weights(
            grad_values, keys, values, lengths, embedded, asker, window, row, height, WINDOW
        )
        share, total = _far_weights(total, asker, embedding, far, places, HEAD, WIDE, WHOLE)
        tl.store(inner + line + rows, total, mask=own & asked)
        grad_query, grad_keys, grad_local_bias = _window_gradients(
            grad_keys, grad_local_bias, weights, weight_grads, total, keys, lengths, asker,
            embedding, window, WINDOW,
        )  # fmt: skip
        grad_query, far_sums = _far_gradients(
            grad_query, far_sums, share, total, own, asker, embedding, far, places, HEAD, WIDE,
            WHOLE,
        )  # fmt: skip
        grad_query = tl.where(owned, grad_query, 0.0)
        grad_query, part, learned, grad_embedding = _query_gradients(
            grad_query, learned, grad_embedding, by_slot, asker, embedding, window
        )
        tl.store(grad_scale + line + rows, part, mask=own & asked)
        tl.store(grad_q + start + place, grad_query, mask=owned & (row < height))

        place = pixels + (row - REACH) * width * stride
        grad_key = unit_gradient(grad_keys[0], _unit(keys[0], lengths[0]), lengths[0])
        tl.store(grad_k + start + place, grad_key, mask=owned & (row >= REACH))
        tl.store(grad_v + start + place, grad_values[0], mask=owned & (row >= REACH))

    part = tl.program_id(0) * tl.num_programs(2) + image
    place = part * num_heads + head
    _store_sums(sums, place, learned, grad_local_bias, grad_embedding, HEAD, WIDE, WINDOW, SLOTS)
    if WHOLE:
        far_place = part * num_pooled * stride + head * HEAD
        _store_far_sums(pool_sums, far_place, far_sums, places, num_pooled, stride, HEAD, WIDE)


@triton.jit
def _strip(lanes, width, REACH: tl.constexpr):
    """The columns of a strip; which are in the map, whose queries are looked at, and its own."""
    columns = tl.program_id(0) * (COLUMNS - 4 * REACH) + lanes - 2 * REACH
    there = (columns >= 0) & (columns < width)
    asking = there & (lanes >= REACH) & (lanes < COLUMNS - REACH)
    own = there & (lanes >= 2 * REACH) & (lanes < COLUMNS - 2 * REACH)
    return columns, there, asking, own


@triton.jit
def _repeated(x, COUNT: tl.constexpr):
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (x,)
    return rows


@triton.jit
def _asker(q, grad, scale, log_sum, at, in_head, rows):
    """A row's queries and gradients, and their inverse lengths, scales, sums' logarithms, places.

    `at` is where these are: those of a map, of an image and of all, and which are there.
    """
    place, in_image, in_all, asked = at
    query = tl.load(q + place, mask=asked[:, None] & in_head, other=0.0)
    given = tl.load(grad + place, mask=asked[:, None] & in_head, other=0.0)
    peak = tl.load(log_sum + in_image, mask=asked, other=float("inf"))
    sharpness = tl.load(scale + in_all, mask=asked, other=0.0)
    return query, given, inverse_length(query), sharpness, peak, rows


@triton.jit
def _unit(x, inverse):
    return x.to(tl.float32) * inverse[:, None]


@triton.jit
def _asking_for(asker, embedding):
    """Unit queries with the embedding, rounded as maps are."""
    query, _, inverse, _, _, _ = asker
    return (_unit(query, inverse) + embedding[None, :]).to(query.dtype)


@triton.jit
def _far_tokens(
    pool_k, pool_v, bias, places, num_queries, num_pooled, stride,
    HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where pooled tokens are, and as many of them as are taken at a time."""
    key = load_tokens(pool_k, places, num_pooled, stride, HEAD, WIDE)
    value = load_tokens(pool_v, places, num_pooled, stride, HEAD, WIDE)
    return pool_k, pool_v, bias, num_queries, num_pooled, stride, key, value


@triton.jit
def _window(
    tokens, token_bias, local_bias, head, lanes, channels, there, own,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Tables by slot, and where a window's slots are: of pairs, keys come first."""
    AREA: tl.constexpr = WINDOW * WINDOW
    REACH: tl.constexpr = WINDOW // 2
    slots = tl.arange(0, SLOTS)
    token = load_learned(tokens, head, channels, HEAD, WINDOW, SLOTS)
    token_constant = tl.load(token_bias + head * AREA + slots, mask=slots < AREA, other=0.0)
    constant = tl.load(local_bias + head * AREA + slots, mask=slots < AREA, other=0.0)
    constant = tl.broadcast_to(constant[:, None], (SLOTS, COLUMNS))
    # How many columns a key is right of a query's window's first.
    offset = lanes[:, None] - lanes[None, :] + REACH
    near = (offset >= 0) & (offset < WINDOW) & there[:, None]
    # Of each query, the lanes in which its window's slots are, and their rows, if it is its own.
    slot_lanes = clamp(lanes[None, :] + slots[:, None] % WINDOW - REACH, COLUMNS)
    slot_rows = tl.where(own[None, :], slots[:, None] // WINDOW, -1)
    return token, token_constant, constant, offset, near, slot_lanes, slot_rows


@triton.jit
def _window_weights(
    grad_values, keys, values, lengths, embedded, asker, window, row, height, WINDOW: tl.constexpr
):
    """The weights of a window's keys, and their gradients; add to the gradients of its values.

    Also, of each query, the weights' gradients by slot, and what they and the weights come to,
    multiplied and added up.
    """
    REACH: tl.constexpr = WINDOW // 2
    query, given, inverse, sharpness, peak, _ = asker
    token, token_constant, constant, offset, near, slot_lanes, slot_rows = window
    turned_query, turned_given = tl.trans(query), tl.trans(given)
    by_token = mix(token, turned_query) * inverse[None, :] + token_constant[:, None]
    weights, weight_grads, sums_of_values = (), (), ()
    total = tl.zeros((COLUMNS,), tl.float32)
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
    total, asker, embedding, far, places, HEAD: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The weights of the first pooled keys; add all their products with their gradients up."""
    _, _, _, _, num_pooled, _, key, value = far
    given = asker[1]
    share = _share(asker, embedding, far, key, places)
    if WHOLE:
        total += tl.sum(share * product(given, tl.trans(value)), axis=1)
    else:
        for first in range(0, num_pooled, places.shape[0]):
            other = _others(asker, embedding, far, first + places, HEAD, WIDE)
            total += tl.sum(other[2] * product(given, tl.trans(other[1])), axis=1)
    return share, total


@triton.jit
def _others(asker, embedding, far, index, HEAD: tl.constexpr, WIDE: tl.constexpr):
    """Other pooled keys and values than the first, and the softmax's weights of these."""
    pool_k, pool_v, _, _, num_pooled, stride, _, _ = far
    key = load_tokens(pool_k, index, num_pooled, stride, HEAD, WIDE)
    value = load_tokens(pool_v, index, num_pooled, stride, HEAD, WIDE)
    return key, value, _share(asker, embedding, far, key, index)


@triton.jit
def _share(asker, embedding, far, key, index):
    """The softmax's weights of pooled keys."""
    query, _, inverse, sharpness, peak, rows = asker
    logit = far_logits(
        query, inverse, sharpness, embedding, key, far[2], rows, index, far[3], far[4]
    )
    return tl.exp(logit - peak[:, None])


@triton.jit
def _window_gradients(
    grad_keys, grad_local_bias, weights, weight_grads, total, keys, lengths, asker, embedding,
    window, WINDOW: tl.constexpr,
):  # fmt: skip
    """What the window's logits add to the gradients of queries, of its keys and its bias."""
    _, _, _, _, _, slot_lanes, slot_rows = window
    asking_for, sharpness = _asking_for(asker, embedding), asker[3]
    grad_query = tl.zeros(asking_for.shape, tl.float32)
    sums_of_keys = ()
    for i in tl.static_range(WINDOW):
        logit_grad = weights[i] * (weight_grads[i] - total[None, :])
        grad_query += _mix_finely(tl.trans(logit_grad * lengths[i][:, None]), keys[i])
        added = mix(logit_grad * sharpness[None, :], asking_for)
        sums_of_keys = sums_of_keys + (grad_keys[i] + added,)
        by_slot = tl.where(slot_rows == i, tl.gather(logit_grad, slot_lanes, axis=0), 0.0)
        grad_local_bias += tl.sum(by_slot, axis=1)
    return grad_query, sums_of_keys, grad_local_bias


@triton.jit
def _far_gradients(
    grad_query, far_sums, share, total, own, asker, embedding, far, places,
    HEAD: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What pooled keys' logits add to the gradients of queries, and, if `WHOLE`, of them."""
    query, given, _, sharpness, _, _ = asker
    _, _, _, _, num_pooled, _, key, value = far
    grad_keys, grad_values = far_sums
    if WHOLE:
        share = tl.where(own[:, None], share, 0.0)
        share_grad = share * (product(given, tl.trans(value)) - total[:, None])
        grad_query += _mix_finely(share_grad * inverse_length(key)[None, :], key)
        share_grad = narrow(share_grad * sharpness[:, None], query.dtype)
        grad_keys += product(tl.trans(_asking_for(asker, embedding)), share_grad)
        grad_values += product(tl.trans(given), narrow(share, query.dtype))
    else:
        for first in range(0, num_pooled, places.shape[0]):
            other_key, other_value, part = _others(
                asker, embedding, far, first + places, HEAD, WIDE
            )
            part *= product(given, tl.trans(other_value)) - total[:, None]
            grad_query += _mix_finely(part * inverse_length(other_key)[None, :], other_key)
    return grad_query, (grad_keys, grad_values)


@triton.jit
def _query_gradients(grad_query, learned, grad_embedding, by_slot, asker, embedding, window):
    """From the gradient of scaled unit queries with the embedding to those of what made them.

    Of queries, the scale, learned tokens with their bias, and the embedding.
    """
    query, _, inverse, sharpness, _, _ = asker
    grad_tokens, grad_bias = learned
    unit = _unit(query, inverse)
    grad_scale = tl.sum(grad_query * (unit + embedding[None, :]), axis=1)
    grad_query *= sharpness[:, None]
    grad_embedding += tl.sum(grad_query, axis=0)
    grad_tokens += mix(by_slot * inverse[None, :], query)
    grad_bias += tl.sum(by_slot, axis=1)
    if query.dtype == tl.float32:
        grad_query += product(tl.trans(by_slot), window[0])
    else:
        grad_query += tl.dot(tl.trans(by_slot), window[0], input_precision="tf32x3")
    grad_query = unit_gradient(grad_query, unit, inverse)
    return grad_query, grad_scale, (grad_tokens, grad_bias), grad_embedding


@triton.jit
def _store_sums(
    sums, place, learned, grad_local_bias, grad_embedding,
    HEAD: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    AREA: tl.constexpr = WINDOW * WINDOW
    slots, channels = tl.arange(0, SLOTS), tl.arange(0, WIDE)
    in_window, in_head = slots < AREA, channels < HEAD
    sums += place * (HEAD * AREA + 2 * AREA + HEAD)
    at = channels[None, :] * AREA + slots[:, None]
    tl.store(sums + at, learned[0], mask=in_head[None, :] & in_window[:, None])
    sums += HEAD * AREA
    tl.store(sums + slots, learned[1], mask=in_window)
    tl.store(sums + AREA + slots, grad_local_bias, mask=in_window)
    tl.store(sums + 2 * AREA + channels, grad_embedding, mask=in_head)


@triton.jit
def _store_far_sums(
    sums, place, far_sums, places, num_pooled, stride, HEAD: tl.constexpr, WIDE: tl.constexpr
):
    channels = tl.arange(0, WIDE)
    mask = (places < num_pooled)[None, :] & (channels < HEAD)[:, None]
    at = place + places[None, :] * stride + channels[:, None]
    tl.store(sums + at, far_sums[0], mask=mask)
    parts = tl.num_programs(0).to(tl.int64) * tl.num_programs(2)
    tl.store(sums + parts * num_pooled * stride + at, far_sums[1], mask=mask)


@triton.jit
def _mix_finely(weights, x):
    """The same as `mix`, with what rounding the weights leaves: sums over all queries show it."""
    mixed = mix(weights, x)
    if x.dtype != tl.float32:
        mixed += mix(weights - narrow(weights, x.dtype).to(tl.float32), x)
    return mixed
