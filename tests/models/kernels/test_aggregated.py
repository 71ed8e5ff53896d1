"""Aggregated attention's kernels, in Triton's interpreter."""

import pytest
import torch
from torch.nn import functional as F

from models.kernels import aggregated_attention
from models.kernels.choice import force
from models.kernels.triton_aggregated import aggregate, aggregate_gradients
from tests.models.kernels.interpreter import (
    DTYPES,
    check,
    check_one_graph,
    counted_traffic,
    saved_addresses,
)

# Batch, grid, heads, head width, pooled tokens, window: one token and one pooled; an odd width in
# a strip; several strips; more pooled tokens than registers hold; a wide head; a wide window.
CASES = [
    (1, (1, 1), 1, 16, 1, 3),
    (2, (5, 3), 2, 24, 4, 3),
    (1, (2, 17), 1, 32, 20, 3),
    (1, (3, 4), 1, 16, 72, 3),
    (1, (2, 3), 1, 48, 6, 3),
    (1, (3, 12), 2, 24, 6, 5),
]


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def visible(grid, window):
    """Which slots of each query's window [N, window²] are in the image."""
    inside = F.unfold(torch.ones(1, 1, *grid), window, padding=window // 2)
    return inside[0].T.bool()


def operator(grid, window):
    """The operator on a grid, of tensors alone."""
    seen = visible(grid, window)

    def attend(q, k, v, pool_k, pool_v, embedding, temperature, tokens, token_bias, local, pooled):
        return aggregated_attention(
            q,
            k,
            v,
            pool_k,
            pool_v,
            query_embedding=embedding,
            temperature=temperature,
            key_count=seen.sum(dim=1).to(q.device) + pool_k.shape[1],
            local_bias=local,
            pool_bias=pooled,
            tokens=tokens,
            token_bias=token_bias,
            outside=~seen.to(q.device),
        )

    return attend


def inputs(batch, grid, heads, width, num_pooled, window):
    maps = [randn(seed, batch, *grid, heads * width) for seed in range(3)]
    maps += [randn(seed, batch, num_pooled, heads * width) for seed in (3, 4)]
    num_queries, area = grid[0] * grid[1], window**2
    return [
        *maps,
        randn(5, heads, 1, width) / 4,
        randn(6, heads, 1, 1),
        randn(7, heads, width, area) / 4,
        randn(8, heads, 1, area) / 4,
        randn(9, heads, 1, area),
        randn(10, heads, num_queries, num_pooled),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_definition_and_so_are_all_gradients(case, dtype):
    _, grid, *_, window = case
    check(operator(grid, window), inputs(*case), dtype)


def test_a_vector_of_zeros_leaves_gradients_finite_in_half_precision():
    """Its length is the least there is, and one over that beyond float16's range."""
    case = (1, (2, 3), 1, 24, 4, 3)
    leaves = [x.half() for x in inputs(*case)]
    for x in (leaves[0], leaves[1]):
        x[0, 1, 1] = 0
    leaves[3][0, 2] = 0
    leaves = [x.requires_grad_() for x in leaves]
    with force("triton"):
        grads = torch.autograd.grad(operator((2, 3), 3)(*leaves).sum(), leaves)
    elsewhere = grads[0].clone()
    elsewhere[0, 1, 1] = 0
    assert elsewhere.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads[5:])


def arguments(case, dtype=torch.float32):
    """What the operator's kernels take."""
    *maps, embedding, _, tokens, token_bias, local, pooled = inputs(*case)
    scale = randn(11, *pooled.shape[:2], 1).exp()
    maps = [x.to(dtype) for x in maps]
    return [*maps, embedding, scale, tokens, token_bias, local, pooled]


@pytest.mark.slow
def test_little_is_moved_twice_in_the_first_stage():
    """Of half an image of TransNeXt's at 224 pixels, narrowed."""
    given = arguments((1, (56, 28), 1, 24, 49, 3), torch.bfloat16)
    with counted_traffic() as forward:
        out, log_sum = aggregate(*given)
    with counted_traffic() as backward:
        aggregate_gradients(out, log_sum, *given)
    every = [x.numel() * x.element_size() for x in (*given, out, log_sum)]
    assert forward.total <= 1.3 * sum(every)
    # The gradient of the bias is a second pass, for which the bias is in the cache.
    bias, read = every[10], every[:11]
    assert backward.total - bias <= 1.6 * (sum(every) + sum(read))


def test_its_operators_are_sound():
    given = arguments((2, (3, 4), 2, 16, 3, 3))
    torch.library.opcheck(aggregate, tuple(given))
    out, log_sum = aggregate(*given)
    torch.library.opcheck(aggregate_gradients, (out, log_sum, *given))


def test_it_saves_its_inputs_and_a_number_for_each_query():
    case = (1, (3, 4), 2, 16, 3, 3)
    leaves = [x.requires_grad_() for x in inputs(*case)]
    saved = saved_addresses(operator((3, 4), 3), leaves)
    mine = {x.untyped_storage().data_ptr() for x in leaves}
    # The scale of queries, made of the temperature, and the logarithms of the softmax's sums.
    assert len([address for address in saved if address not in mine]) <= 4


@pytest.mark.slow
def test_it_is_one_graph_to_the_compiler():
    case = (1, (3, 4), 2, 16, 3, 3)
    check_one_graph(operator((3, 4), 3), [x.requires_grad_() for x in inputs(*case)])
