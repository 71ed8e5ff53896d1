"""Every published variant reproduces the official implementation's numbers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import build
from tests.models.golden_stream import (
    arrays,
    deviation,
    document,
    golden_model,
    images,
    labels,
    stream,
    summary,
)

TRANSNEXT = ["transnext_micro", "transnext_tiny", "transnext_small", "transnext_base"]
TRANSXNET = ["transxnet_t", "transxnet_s", "transxnet_b"]
SLOW = {"transnext_small", "transnext_base", "transxnet_s", "transxnet_b"}


def each(names):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


def logits_tolerance(name):
    if name in TRANSXNET:
        return 1e-5
    return 3e-5 if name in ("transnext_micro", "transnext_tiny") else 1e-4


def check_eval(model, name, tag, *, batch, size, logits=True):
    reference = arrays(name)
    model.eval()
    with torch.no_grad():
        stages = model.forward_features(images(batch, size))
        for number, stage in enumerate(stages, start=1):
            assert deviation(summary(stage), reference[f"{tag}.stage{number}"]) < 1e-4, number
        if logits:
            error = deviation(model.classify(stages[-1]), reference[f"{tag}.logits"])
            assert error < logits_tolerance(name)


def test_stream():
    check = document("check_values.json")
    for name, values in check.items():
        assert stream(name, len(values)).tolist() == values


@pytest.mark.parametrize("name", each([*TRANSNEXT, "transnext_micro_AAAA", *TRANSXNET]))
def test_names(name):
    with torch.device("meta"):
        model = build(name, img_size=256, pretrain_size=224)
    names = document(f"{name}.names.json")
    assert [(n, list(p.shape)) for n, p in model.named_parameters()] == list(
        names["params"].items()
    )
    extra = {n: list(v.shape) for n, v in model.state_dict().items() if n not in names["params"]}
    assert extra == names["buffers"]
    assert sum(p.numel() for p in model.parameters()) == names["n_params"]


@pytest.mark.parametrize("name", each([*TRANSNEXT, *TRANSXNET]))
def test_eval(name):
    check_eval(golden_model(name), name, "eval224", batch=2, size=(224, 224))


@pytest.mark.parametrize("name", each([*TRANSNEXT, *TRANSXNET]))
def test_eval_384(name):
    model = golden_model(name, img_size=384, pretrain_size=224)
    check_eval(model, name, "eval384", batch=1, size=(384, 384))


@pytest.mark.parametrize("name", each(TRANSXNET))
def test_eval_not_square(name):
    model = golden_model(name, img_size=(256, 192))
    check_eval(model, name, "eval256x192", batch=1, size=(256, 192))


@pytest.mark.parametrize("name", ["transnext_micro", "transnext_tiny"])
def test_eval_fixed_pool(name):
    model = golden_model(name, img_size=384, pretrain_size=224, fixed_pool_size=7)
    check_eval(model, name, "eval384_pool7", batch=1, size=(384, 384))


def test_eval_aggregated_everywhere():
    model = golden_model("transnext_micro_AAAA", img_size=256)
    check_eval(model, "transnext_micro_AAAA", "eval256", batch=2, size=(256, 256))


@pytest.mark.parametrize("name", each(TRANSNEXT))
@pytest.mark.parametrize(
    ("mode", "tag"),
    [("extrapolate", "dense256x192_extrap"), ("interpolate", "dense256x192_interp224")],
)
def test_dense(name, mode, tag):
    model = golden_model(name, position_mode=mode)
    model.reset_buffers((256, 192))
    check_eval(model, name, tag, batch=1, size=(256, 192), logits=False)


@pytest.mark.parametrize("size", [224, 384])
def test_coordinates(size):
    model = golden_model("transnext_micro", img_size=size, pretrain_size=224)
    for stage in range(1, 5):
        geometry = model.geometry(stage)
        rows, columns = geometry.features(torch.float32)
        table = torch.cartesian_prod(rows, columns)
        reference = arrays("transnext_micro")[f"coords{size}.stage{stage}"]
        assert deviation(summary(table[geometry.pairs]), reference) < 1e-6


@pytest.mark.parametrize("name", each([*TRANSNEXT, "transnext_micro_AAAA", *TRANSXNET]))
def test_training_pass(name):
    reference, info = arrays(name), document(f"{name}.info.json")
    # The fixture's own float32 noise, measured against float64, exceeds the tolerance for one
    # weight of one size; ours comes on top of it.
    noise = document("fp32_vs_fp64.json").get(name, {}).get("grad_norm_rel_max", 0.0)
    model = golden_model(name, img_size=info["base"], drop_path=0.0).train()
    batch = info["train_batch"]
    logits = model(images(batch, (info["base"], info["base"])))
    loss = F.cross_entropy(logits, labels(batch))
    loss.backward()
    assert deviation(loss.item(), reference["train.loss"]) < 1e-4
    assert deviation(logits.detach(), reference["train.logits"]) < 1e-3
    check_gradients(model, reference, tolerance=1e-3 if noise < 5e-4 else 3 * noise)
    check_buffers(model, reference.get("train.buffer_after"))


def check_buffers(model, expected):
    """Mean and norm of every buffer after one pass; IDConv's batch norm has moved twice."""
    buffers = [
        value.double()
        for name, value in model.state_dict().items()
        if name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")
    ]
    if expected is None:
        assert not buffers
        return
    found = np.array([[value.mean().item(), value.norm().item()] for value in buffers])
    assert (np.abs(found - expected) / np.maximum(1, np.abs(expected))).max() < 1e-4


def check_gradients(model, reference, *, tolerance):
    norms = np.array([p.grad.norm().item() for p in model.parameters()])
    expected = reference["train.grad_norm"]
    # Norms below a thousandth of the largest are noise: their error is measured against that.
    scale = np.maximum(expected, 1e-3 * expected.max())
    assert (np.abs(norms - expected) / scale).max() < tolerance
    for parameter, first, size in zip(
        model.parameters(), reference["train.grad_first4"], scale, strict=True
    ):
        values = parameter.grad.flatten()[:4].numpy()
        assert np.abs(values - first[: len(values)]).max() < tolerance * size
