"""The kernels of attention with a table, in the interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.kernels import cosine_attention, relative_attention
from models.kernels.choice import force
from models.kernels.triton_attention import attention, attention_gradients
from tests.models.kernels.interpreter import DTYPES, check, check_one_graph, counted_traffic

# Batch, grid, heads, head width: one token, the last stage at 224 pixels, several blocks of keys.
COSINE = [(2, (1, 1), 2, 16), (2, (7, 7), 1, 24), (1, (5, 15), 2, 48)]
# Batch, grid, grid of the keys, heads, head width: one token, an odd width, several blocks of
# queries, several programs for them with as many images as two groups, and several blocks of keys.
RELATIVE = [
    (2, (1, 1), (1, 1), 1, 16),
    (17, (2, 3), (1, 3), 2, 19),
    (2, (14, 14), (7, 7), 1, 32),
    (17, (16, 17), (1, 3), 1, 19),
    (1, (3, 4), (6, 12), 1, 24),
]


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(qkv, query_embedding, temperature, bias):
    num_tokens = bias.shape[-1]
    return cosine_attention(
        qkv,
        query_embedding=query_embedding,
        temperature=temperature,
        key_count=torch.full((num_tokens,), num_tokens + 1, device=qkv.device),
        bias=bias,
    )


def relative(q, kv, position):
    return relative_attention(q, kv, position=position, num_heads=position.shape[0])


def cosine_inputs(batch, grid, heads, width):
    num_tokens = grid[0] * grid[1]
    return [
        randn(1, batch, *grid, 3 * heads * width),
        randn(2, heads, 1, width) / 4,
        randn(3, heads, 1, 1),
        randn(4, heads, num_tokens, num_tokens),
    ]


def relative_inputs(batch, grid, pool, heads, width):
    return [
        randn(1, batch, *grid, heads * width),
        randn(2, batch, *pool, 2 * heads * width),
        randn(3, heads, grid[0] * grid[1], pool[0] * pool[1]),
    ]


OPERATORS = {
    "cosine": (cosine, cosine_inputs(2, (2, 3), 2, 8)),
    "relative": (relative, relative_inputs(2, (3, 3), (1, 2), 2, 8)),
}
ARGUMENTS = {
    "cosine": ([randn(1, 2, 2, 3, 48)], randn(2, 2, 6, 6), randn(3, 2, 1, 8), randn(4, 2, 6, 1)),
    "relative": ([randn(1, 2, 3, 3, 16), randn(2, 2, 1, 2, 32)], randn(3, 2, 9, 2), None, None),
}
either = pytest.mark.parametrize("name", OPERATORS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", COSINE, ids=str)
def test_cosine_attention(shape, dtype):
    check(cosine, cosine_inputs(*shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RELATIVE, ids=str)
def test_relative_attention(shape, dtype):
    check(relative, relative_inputs(*shape), dtype)


def test_queries_of_no_length_have_the_gradients_of_the_definition():
    inputs = cosine_inputs(1, (2, 3), 1, 8)
    inputs[0][0, 0, 0] = 0
    found = []
    for form in ("triton", "eager"):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with force(form):
            found.append(torch.autograd.grad(cosine(*leaves).square().sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(2, 3), (5, 15)], ids=str)
def test_a_vector_of_zeros_leaves_gradients_finite_in_half_precision(grid):
    """Its length is the least there is, and one over that beyond float16's range."""
    leaves = [x.half() for x in cosine_inputs(1, grid, 1, 16)]
    leaves[0][0, 1, 1] = 0
    leaves[0][0, 1, 2, 16:] = 0
    leaves = [x.requires_grad_() for x in leaves]
    with force("triton"):
        grads = torch.autograd.grad(cosine(*leaves).sum(), leaves)
    grads[0][0, 1, 1:3] = 0  # their own are as large as one over their length
    assert all(grad.isfinite().all() for grad in grads)


def traffic(maps, table, *parameters):
    """Bytes moved each way; the table, which stays in the cache, is counted as read once."""
    with counted_traffic() as forward:
        out, lse = attention(maps, table, *parameters)
    with counted_traffic() as backward:
        attention_gradients(out, lse, maps, table, *parameters)
    return forward.total, backward.total


def bytes_of(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_little_is_moved_twice_in_the_last_stage():
    """Of TransNeXt's at 224 pixels, narrowed; the gradient of the table is written once a group."""
    qkv, _, _, table = cosine_inputs(16, (7, 7), 1, 24)
    embedding, scale = randn(5, 1, 1, 24), randn(6, 1, 49, 1)
    qkv = qkv.bfloat16()
    forward, backward = traffic([qkv], table, embedding, scale)
    again = 15 * bytes_of(table)  # from the cache
    out, denominators = bytes_of(qkv) / 3, 16 * 49 * 4
    assert forward - again <= 1.3 * (bytes_of(qkv, table) + out + denominators)
    least = 2 * bytes_of(qkv, table) + out + denominators
    assert backward - again <= 1.6 * least


@pytest.mark.parametrize(
    ("width", "dtype"), [(32, torch.bfloat16), (19, torch.bfloat16), (32, torch.float32)], ids=str
)
def test_little_is_moved_twice_where_keys_are_few(width, dtype):
    """Of OSRA's second stage at 224 pixels, narrowed; what adds up parts is counted, too."""
    q, kv, table = relative_inputs(8, (28, 28), (7, 7), 1, width)
    q, kv = q.to(dtype), kv.to(dtype)
    forward, backward = traffic([q, kv], table, None, None)
    again = 7 * bytes_of(table)  # from the cache
    denominators = 8 * 784 * 4
    least = bytes_of(q, q, kv, table) + denominators
    assert forward - again <= 1.3 * least
    least = bytes_of(q, q, q, kv, kv, table, table) + denominators
    assert backward - again <= 1.6 * least


@either
def test_its_operators_are_sound(name):
    maps, *parameters = ARGUMENTS[name]
    torch.library.opcheck(attention, (maps, *parameters))
    out, lse = attention(maps, *parameters)
    torch.library.opcheck(attention_gradients, (out, lse, maps, *parameters))


@either
def test_it_saves_its_inputs_and_denominators_alone(name):
    operator, inputs = OPERATORS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    saved = []

    def keep(x):
        saved.append(x)
        return x

    with force("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = operator(*leaves)
    addresses = {x.untyped_storage().data_ptr() for x in leaves}
    fresh = [x for x in saved if x.untyped_storage().data_ptr() not in addresses]
    # Denominators and, of cosines, what makes the scale of the temperature.
    per_query = out.numel() // 8
    assert sum(x.numel() for x in fresh) <= 2 * per_query


@pytest.mark.slow
@either
def test_it_is_one_graph_to_the_compiler(name):
    operator, inputs = OPERATORS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    check_one_graph(operator, leaves)


@pytest.mark.parametrize(
    ("name", "products"), [("cosine", 2 * 6 * 6 * 16), ("relative", 2 * 9 * 2 * 16)]
)
def test_flops_are_counted(name, products):
    operator, inputs = OPERATORS[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    with force("triton"), FlopCounterMode(display=False) as counter:
        operator(*leaves).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * products
