"""Deformable attention against loops over its definition."""

import math

import pytest
import torch

from trainer.finetune.heads.dino.deformable import DeformableAttention, weighted_samples
from trainer.finetune.heads.dino.pyramid import Pyramid, lay_out

SHAPES = ((3, 4), (2, 2))


def bilinear(grid, x, y):
    """The vector at (x, y) of grid [H, W, d], cells having their centres at halves; 0 outside."""
    height, width = grid.shape[:2]
    left, top = math.floor(x.item() - 0.5), math.floor(y.item() - 0.5)
    total = torch.zeros(grid.shape[2], dtype=grid.dtype)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - (x - 0.5 - column).abs()) * (1 - (y - 0.5 - row).abs())
                total = total + share * grid[row, column]
    return total


def naive(values, shapes, points, weights):
    """`weighted_samples` by its definition, one point at a time."""
    batch, queries, heads, levels, count = weights.shape
    out = torch.zeros(batch, queries, heads, values.shape[3], dtype=values.dtype)
    for image in range(batch):
        for query in range(queries):
            for head in range(heads):
                start = 0
                total = torch.zeros(values.shape[3], dtype=values.dtype)
                for level in range(levels):
                    height, width = shapes[level]
                    grid = values[image, start : start + height * width, head]
                    grid = grid.reshape(height, width, -1)
                    start += height * width
                    for point in range(count):
                        x, y = points[image, query, head, level, point]
                        share = weights[image, query, head, level, point]
                        total = total + share * bilinear(grid, x * width, y * height)
                out[image, query, head] = total
    return out


def random_case(queries=5):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    points = 0.5 + 0.5 * normal(2, queries, 2, 2, 3, 2)  # some fall outside
    return normal(2, 16, 2, 4), points, normal(2, queries, 2, 2, 3).softmax(-1)


def test_samples_are_those_of_the_definition():
    values, points, weights = random_case()
    assert ((points < 0) | (points > 1)).any()
    found = weighted_samples(values, SHAPES, points, weights)
    torch.testing.assert_close(found, naive(values, SHAPES, points, weights))


def test_gradients_are_those_of_the_definition():
    case = [part.requires_grad_() for part in random_case()]
    probe = torch.randn(2, 5, 2, 4, generator=torch.Generator().manual_seed(1)).double()
    ours, theirs = (
        torch.autograd.grad(fn(case[0], SHAPES, case[1], case[2]), case, probe)
        for fn in (weighted_samples, naive)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_gradients_are_those_of_differences():
    values, points, weights = (part.requires_grad_() for part in random_case(queries=1))
    assert torch.autograd.gradcheck(
        lambda v, p, w: weighted_samples(v, SHAPES, p, w), (values, points, weights)
    )


def attention(seed=0):
    torch.manual_seed(seed)
    module = DeformableAttention(8, heads=2, levels=2, points=3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("sides", [2, 4], ids=["points", "boxes"])
def test_the_module_looks_where_its_formula_says(sides):
    module, generator = attention(), torch.Generator().manual_seed(3)
    # The second image covers less of the maps than the first.
    pyramid = lay_out(torch.tensor([[12.0, 16.0], [8.0, 12.0]]), SHAPES, (4, 8))
    queries = torch.randn(2, 5, 8, generator=generator)
    tokens = torch.randn(2, 16, 8, generator=generator)
    references = torch.rand(2, 5, sides, generator=generator)
    values = module.value(tokens) * pyramid.inside[..., None]
    offsets = module.offsets(queries).reshape(2, 5, 2, 2, 3, 2)
    weights = module.weights(queries).reshape(2, 5, 2, 6).softmax(-1).reshape(2, 5, 2, 2, 3)
    points = torch.empty(2, 5, 2, 2, 3, 2)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in points.shape[:5])).tolist():
        image, query, _, level, _ = index
        reference = references[image, query]
        cells = torch.tensor(SHAPES[level]).flip(0)
        if sides == 4:
            place = reference[:2] + offsets[tuple(index)] / 3 * reference[2:] / 2
            points[tuple(index)] = place * pyramid.coverage[image, level]
        else:
            place = reference * pyramid.coverage[image, level]
            points[tuple(index)] = place + offsets[tuple(index)] / cells
    expected = naive(
        values.reshape(2, 16, 2, 4).double(), SHAPES, points.double(), weights.double()
    )
    found = module(queries, references, tokens, pyramid)
    torch.testing.assert_close(found, module.out(expected.float().flatten(-2)))


def test_what_is_outside_of_an_image_is_not_seen():
    module, generator = attention(), torch.Generator().manual_seed(4)
    pyramid = lay_out(torch.tensor([[8.0, 12.0]]), SHAPES, (4, 8))
    assert not pyramid.inside.all()
    tokens = torch.randn(1, 16, 8, generator=generator)
    changed = torch.where(pyramid.inside[..., None], tokens, 100.0)
    queries, references = torch.randn(1, 9, 8, generator=generator), torch.rand(1, 9, 2)
    same = module(queries, references, changed, pyramid)
    torch.testing.assert_close(same, module(queries, references, tokens, pyramid))


def test_heads_begin_by_looking_around_in_all_directions():
    module = DeformableAttention(16, heads=4, levels=1, points=2)
    pyramid = Pyramid(
        ((9, 9),),
        torch.ones(1, 1, 2),
        torch.zeros(1, 81, 2),
        torch.ones(1, 81, dtype=torch.bool),
    )
    offsets = module.offsets(torch.randn(1, 1, 16))
    places = module._places(offsets, torch.full((1, 1, 2), 0.5), pyramid)[0, 0, :, 0] * 9 - 4.5
    right, down = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    near = torch.stack([right, down, -right, -down])
    torch.testing.assert_close(places, torch.stack([near, 2 * near], 1), atol=1e-5, rtol=0)
