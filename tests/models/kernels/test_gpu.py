"""The kernels on a GPU: what the interpreter's tests check of them, and larger maps."""

import os

import pytest
import torch

from models.kernels import conv_glu, dynamic_conv
from tests.models.kernels import (
    test_aggregated,
    test_attention,
    test_conv_glu,
    test_dynamic_conv,
    test_norm_conv,
)
from tests.models.kernels.interpreter import DTYPES, Op, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu"),
]
# What PyTorch asks for before it lets matrix products be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Stages of the Tiny variants at 224 pixels.
AGGREGATED = [*test_aggregated.CASES, (2, (56, 56), 3, 24, 49, 3), (1, (96, 96), 3, 24, 144, 3)]
COSINE = [*test_attention.COSINE, (16, (7, 7), 24, 24), (2, (12, 12), 24, 24)]
RELATIVE = [*test_attention.RELATIVE, (4, (56, 56), (7, 7), 1, 24)]
GATED = [*test_conv_glu.SHAPES, (2, 56, 56, 384)]
EACH = [*test_dynamic_conv.SHAPES, (2, 56, 56, 24)]
MIXED = [*test_norm_conv.CASES, ((2, 56, 56, 192), (48, 48, 48, 48))]


def gated(shape) -> tuple[Op, list[torch.Tensor]]:
    return conv_glu, test_conv_glu.inputs(shape)


def each(shape) -> tuple[Op, list[torch.Tensor]]:
    return dynamic_conv, test_dynamic_conv.inputs(shape)


def mixed(case) -> tuple[Op, list[torch.Tensor]]:
    return test_norm_conv.widened_conv, test_norm_conv.inputs(*case)


def aggregated(case) -> tuple[Op, list[torch.Tensor]]:
    return test_aggregated.operator(case[1], case[-1]), test_aggregated.inputs(*case)


def cosine(case) -> tuple[Op, list[torch.Tensor]]:
    return test_attention.cosine, test_attention.cosine_inputs(*case)


def relative(case) -> tuple[Op, list[torch.Tensor]]:
    return test_attention.relative, test_attention.relative_inputs(*case)


CASES = [
    *[(aggregated, case) for case in AGGREGATED],
    *[(cosine, case) for case in COSINE],
    *[(relative, case) for case in RELATIVE],
    *[(gated, case) for case in GATED],
    *[(each, case) for case in EACH],
    *[(mixed, case) for case in MIXED],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("make", "case"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_value_and_gradients(make, case, dtype):
    op, inputs = make(case)
    check(op, [x.cuda() for x in inputs], dtype)
