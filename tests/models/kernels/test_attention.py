"""The kernels of attention, in the interpreter."""

import functools

import pytest
import torch

from models.kernels import cosine_attention, relative_attention
from tests.models.kernels.interpreter import DTYPES, check


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(qkv, query_embedding, temperature, bias):
    key_count = torch.full(bias.shape[1:2], 2.0 + bias.shape[1])
    return cosine_attention(
        qkv,
        query_embedding=query_embedding,
        temperature=temperature,
        key_count=key_count,
        bias=bias,
    )


def relative(q, kv, position):
    return relative_attention(q, kv, position=position, num_heads=position.shape[0])


def cosine_inputs(batch, grid, heads, width):
    tokens = grid[0] * grid[1]
    return [
        randn(1, batch, *grid, 3 * heads * width),
        randn(2, heads, 1, width) / width**0.5,
        randn(3, heads, 1, 1),
        randn(4, heads, tokens, tokens),
    ]


def relative_inputs(batch, grid, keys, heads, width):
    tokens = grid[0] * grid[1], keys[0] * keys[1]
    return [
        randn(1, batch, *grid, heads * width),
        randn(2, batch, *keys, 2 * heads * width),
        randn(3, heads, *tokens),
    ]


# Grid, heads, head width
COSINE = [(2, (1, 1), 2, 16), (3, (7, 7), 2, 24), (1, (5, 15), 1, 48)]
RELATIVE = [(2, (1, 1), (1, 1), 1, 16), (3, (3, 5), (2, 3), 2, 19), (1, (22, 21), (1, 3), 2, 32), (1, (3, 4), (6, 12), 1, 24)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", COSINE, ids=str)
def test_cosine_attention(shape, dtype):
    check(cosine, cosine_inputs(*shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RELATIVE, ids=str)
def test_relative_attention(shape, dtype):
    check(relative, relative_inputs(*shape), dtype)
