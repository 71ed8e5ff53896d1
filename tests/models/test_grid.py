"""Every published size at every kind of input, in training and evaluation, eager and compiled.

Depth repeats what one block of a stage does, so a few blocks stand for all of them here; the
golden tests run the published depths.
"""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from models import build
from models.base import ModelError
from models.registry import MODELS
from models.transxnet import TransXNet

PUBLISHED = [
    "transnext_micro",
    "transnext_tiny",
    "transnext_small",
    "transnext_base",
    "transnext_micro_AAAA",
    "transxnet_t",
    "transxnet_s",
    "transxnet_b",
]
SIZES = [(224, 224), (256, 256), (384, 384), (256, 192), (100, 70), (32, 32)]
PRECISIONS = ["fp32", "bf16"]


def precision(name):
    return torch.autocast("cpu", torch.bfloat16) if name == "bf16" else nullcontext()


@pytest.fixture
def model(name, monkeypatch):
    monkeypatch.setitem(MODELS, name, replace(MODELS[name], depths=(1, 1, 2, 1)))
    torch.manual_seed(0)
    return build(name, img_size=224, num_classes=11)


def check(model, size, *, dtype):
    """Finite stage maps, logits and gradients of the right shapes, in both modes."""
    batch = 2 if isinstance(model, TransXNet) else 1  # batch norm needs two values to normalise
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), precision(dtype):
        maps = model.eval().forward_features(x[:1])
        assert model.classify(maps[-1]).isfinite().all()
    for info, stage in zip(model.feature_info, maps, strict=True):
        reduced = tuple(math.ceil(side / info["reduction"]) for side in size)
        assert stage.shape == (1, info["num_chs"], *reduced)
        assert stage.isfinite().all()
    with precision(dtype):
        logits = model.train()(x)
    assert logits.shape == (batch, 11)
    logits.float().square().sum().backward()
    wrong = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not wrong
    model.zero_grad()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_eager(model, dtype):
    for size in SIZES:
        model.reset_buffers(size)
        check(model, size, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "fp32") for name in PUBLISHED),
        # Capturing a block takes seconds and sees its dtype alone: one size a family is enough.
        ("transnext_micro", "bf16"),
        ("transxnet_t", "bf16"),
    ],
)
def test_compiled(model, dtype):
    """Each block in one graph, the unit in which training compiles.

    The first stages' blocks are of one code, the last one's of another: one of each is captured.
    """
    torch.compiler.reset()
    size = (64, 96)
    model.reset_buffers(size)
    for block in model.blocks():
        if block.residual and block.stage in (1, 4):
            # The backend that captures graphs but leaves out minutes of code generation.
            block.module.forward = torch.compile(
                block.module.forward,
                fullgraph=True,
                dynamic=False,
                recompile_limit=16,
                backend="eager",
            )
    check(model, size, dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_size_is_one_clear_error(name):
    with torch.device("meta"):
        model = build(name, img_size=64)
    with pytest.raises(ModelError, match=r"\(1, 3, 64, 32\) do not fit.*\[B, 3, 64, 64\]"):
        model(torch.empty(1, 3, 64, 32, device="meta"))
