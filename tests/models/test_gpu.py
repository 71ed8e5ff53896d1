"""The models on a GPU give what they give on the CPU."""

import pytest
import torch
from torch.nn import functional as F

from models import build
from models.kernels import (
    batch_norm,
    depthwise_conv,
    dynamic_conv,
    gelu_norm_conv,
    gelu_norm_linear,
)
from tests.models.golden_stream import arrays, deviation, document, golden_model, images, labels
from tests.models.test_golden import check_buffers, check_gradients, logits_tolerance
from trainer.backends.wrap import wrap_blocks
from trainer.sections import MemoryConfig

NAMES = ["transnext_micro", "transnext_tiny", "transxnet_t"]
EPS = 1e-5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu"),
]


@pytest.fixture(autouse=True)
def every_bit(monkeypatch):
    """float32 means float32: cuDNN would take fewer bits of it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def training_pass(model, name, device="cuda", dtype=None):
    """Loss and logits of the fixture's batch; gradients are left in the model."""
    info = document(f"{name}.info.json")
    batch, size = info["train_batch"], (info["base"], info["base"])
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        logits = model(images(batch, size).to(device))
        loss = F.cross_entropy(logits, labels(batch).to(device))
    loss.backward()
    return loss.item(), logits.detach().float().cpu()


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name):
    model = golden_model(name).cuda().eval()
    with torch.no_grad():
        logits = model(images(2, (224, 224)).cuda())
    assert deviation(logits.cpu(), arrays(name)["eval224.logits"]) < logits_tolerance(name)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_training_pass(name, compiled):
    reference = arrays(name)
    model = golden_model(name, drop_path=0.0).cuda().train()
    wrap_blocks(model, MemoryConfig(compile=compiled))
    loss, logits = training_pass(model, name)
    assert deviation(loss, reference["train.loss"]) < 1e-4
    assert deviation(logits, reference["train.logits"]) < 1e-3
    check_gradients(model.cpu(), reference, tolerance=1e-3)
    check_buffers(model, reference.get("train.buffer_after"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name, compiled):
    """As far from float32 as the CPU's bfloat16 is, with and without recomputation."""
    model = golden_model(name, drop_path=0.0).train()
    exact = gradients(model, name)
    model = golden_model(name, drop_path=0.0).train()
    noise = (gradients(model, name, dtype=torch.bfloat16) - exact).norm()
    model = golden_model(name, drop_path=0.0).cuda().train()
    wrap_blocks(model, MemoryConfig(compile=compiled, checkpointing="1,3"))
    found = gradients(model, name, device="cuda", dtype=torch.bfloat16)
    assert (found - exact).norm() < 1.5 * noise


def gradients(model, name, **options):
    """All gradients of the fixture's batch as one vector."""
    training_pass(model, name, **{"device": "cpu", **options})
    return torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])


@pytest.mark.parametrize("name", ["transnext_base", "transxnet_b"])
def test_a_step_at_full_size(name):
    """Sixteen images of 224 pixels in bfloat16: finite everywhere."""
    torch.manual_seed(0)
    model = build(name, drop_path=0.5).cuda().train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(torch.randn(16, 3, 224, 224, device="cuda"))
        F.cross_entropy(logits, torch.arange(16, device="cuda")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def on(device, dtype, function, inputs):
    """Output and gradients of a random combination of it, computed on `device`."""
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    probe = randn(99, *out.shape).to(device, dtype)
    return [value.cpu().double() for value in (out, *torch.autograd.grad(out, leaves, probe))]


OPERATORS = {
    "depthwise": (depthwise_conv, [(2, 13, 9, 16), (16, 1, 7, 7), (16,)]),
    "strided": (
        lambda *inputs: depthwise_conv(*inputs, stride=4),
        [(2, 13, 9, 16), (16, 1, 7, 7), (16,)],
    ),
    "dynamic": (dynamic_conv, [(2, 13, 9, 16), (2, 7, 7, 16), (2, 16)]),
    "norm": (
        lambda *inputs: batch_norm(*inputs, eps=EPS, group=None),
        [(2, 13, 9, 16), (16,), (16,)],
    ),
    "norm and linear": (
        lambda *inputs: gelu_norm_linear(*inputs, eps=EPS, group=None),
        [(2, 13, 9, 16), (16,), (16,), (24, 16), (24,)],
    ),
    "norm and convolutions": (
        lambda x, gain, shift, bias, *weights: gelu_norm_conv(
            x, gain, shift, list(weights), bias, eps=EPS, group=None
        ),
        [(2, 13, 9, 16), (16,), (16,), (16,), (4, 1, 1, 1), (4, 1, 3, 3), (8, 1, 7, 7)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators(operator):
    function, shapes = OPERATORS[operator]
    inputs = [randn(seed, *shape) for seed, shape in enumerate(shapes)]
    for value, reference in zip(
        on("cuda", torch.float32, function, inputs),
        on("cpu", torch.float64, function, inputs),
        strict=True,
    ):
        assert (value - reference).norm() < 1e-5 * reference.norm()
