"""The contract of every backbone: construction, description, drop path, sizes, registry."""

import copy
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import models
from models import build
from models.base import ModelError, keep_scale
from models.layers import drop_path
from models.registry import MODELS

PICO = ["transnext_pico", "transxnet_pico"]


def images(batch, *size):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def on_meta(name, **options):
    with torch.device("meta"):
        return build(name, **options)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_cover_every_parameter_once(name):
    model = on_meta(name, img_size=64)
    blocks = model.blocks()
    described = [
        f"{block.name}.{parameter}"
        for block in blocks
        for parameter, _ in block.module.named_parameters()
    ]
    assert sorted(described) == sorted(parameter for parameter, _ in model.named_parameters())
    assert all(model.get_submodule(block.name) is block.module for block in blocks)
    residual = [block for block in blocks if block.residual]
    assert [block.depth for block in residual] == list(range(model.num_blocks))
    assert [block.stage for block in blocks] == sorted(block.stage for block in blocks)
    assert [block.depth for block in blocks] == sorted(block.depth for block in blocks)
    assert blocks[-1].depth == model.num_blocks
    for entry in model.feature_info:
        assert model.get_submodule(entry["module"])


@pytest.mark.parametrize("name", MODELS)
def test_drop_path_rises_linearly_to_the_published_rate(name):
    rates = on_meta(name, img_size=64).drop_path
    last = MODELS[name].drop_path
    assert rates == pytest.approx([last * g / (len(rates) - 1) for g in range(len(rates))])


@pytest.mark.parametrize("name", PICO)
def test_meta_device_gives_the_same_model(name):
    torch.manual_seed(0)
    direct = build(name, img_size=32, num_classes=10)
    deferred = on_meta(name, img_size=32, num_classes=10)
    assert all(tensor.is_meta for tensor in [*deferred.parameters(), *deferred.buffers()])
    deferred.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*deferred.parameters(), *deferred.buffers()]:
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)
    torch.manual_seed(0)
    deferred.init_weights()
    deferred.reset_buffers((32, 32))
    for (key, value), other in zip(
        deferred.state_dict().items(), direct.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    x = images(2, 32, 32)
    assert torch.equal(deferred.eval()(x), direct.eval()(x))


@pytest.mark.parametrize("name", PICO)
def test_pico_is_small_and_learns(name):
    torch.manual_seed(0)
    model = build(name, img_size=32, num_classes=7)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 600_000
    x, y = images(16, 32, 32), torch.arange(16) % 7
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(7), abs=0.5)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", [*PICO, "transnext_micro", "transxnet_t"])
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (100, 36)])
def test_any_size(name, size):
    """Grids are rounded up alike everywhere, and nothing divides by zero on tiny ones."""
    model = build(name, img_size=size, num_classes=5)
    logits = model(images(2, *size))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for entry, stage in zip(
        model.feature_info, model.eval().forward_features(images(1, *size)), strict=True
    ):
        reduced = tuple(math.ceil(side / entry["reduction"]) for side in size)
        assert stage.shape == (1, entry["num_chs"], *reduced)


@pytest.mark.parametrize("name", PICO)
def test_resizing_equals_building_at_that_size(name):
    torch.manual_seed(0)
    model = build(name, img_size=32, pretrain_size=32).eval()
    other = build(name, img_size=(48, 64), pretrain_size=32).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    x = images(2, 48, 64)
    with pytest.raises(ModelError, match=r"\[B, 3, 32, 32\]"):
        model(x)
    model.reset_buffers((48, 64))
    assert torch.equal(model(x), other(x))


def test_interpolation_changes_nothing_at_the_trained_size():
    torch.manual_seed(0)
    extrapolate = build("transnext_pico", img_size=32).eval()
    interpolate = build("transnext_pico", img_size=32, position_mode="interpolate").eval()
    interpolate.load_state_dict(extrapolate.state_dict())
    x, larger = images(2, 32, 32), images(2, 64, 64)
    assert torch.equal(extrapolate(x), interpolate(x))
    for model in (extrapolate, interpolate):
        model.reset_buffers((64, 64))
    assert not torch.allclose(extrapolate(larger), interpolate(larger), atol=1e-6)


def test_drop_path_rule():
    x, noise = torch.ones(4, 2, 3), torch.tensor([0.0, 0.24, 0.25, 0.99])
    dropped = drop_path(x, keep_scale(noise, 0.25))
    assert dropped[:, 0, 0].tolist() == pytest.approx([0, 0, 4 / 3, 4 / 3])
    assert torch.equal(drop_path(x, keep_scale(noise, 0.0)), x)
    assert drop_path(x, None) is x


def test_layer_scale_multiplies_every_branch():
    torch.manual_seed(0)
    plain = build("transnext_pico", img_size=32).eval()
    scaled = build("transnext_pico", img_size=32, layer_scale=0.5).eval()
    assert {k for k in scaled.state_dict() if k not in plain.state_dict()} == {
        f"{block.name}.layer_scale_{branch}"
        for block in plain.blocks()
        if block.residual
        for branch in (1, 2)
    }
    missing = scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(scaled.get_parameter(name).eq(0.5).all() for name in missing)
    x = images(2, 32, 32)
    halved = copy.deepcopy(plain)
    for block in halved.blocks():
        if block.residual:
            for layer in (block.module.attn.proj, block.module.mlp.fc2):
                layer.weight.data *= 0.5
                layer.bias.data *= 0.5
    torch.testing.assert_close(scaled(x), halved(x))
    assert not torch.allclose(scaled(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("name", PICO)
def test_drop_noise_decides(name):
    torch.manual_seed(0)
    model = build(name, img_size=32, num_classes=4, drop_path=0.5)
    x = images(4, 32, 32)
    for module in model.modules():  # batch statistics would let the samples see one another
        if isinstance(module, models.layers.BatchNorm):
            module.eval()
    keep = torch.ones(model.num_blocks, 2, 4) * 0.99
    drop = keep.clone()
    drop[-1, 1, 2] = 0.1
    full, dropped = model(x, keep), model(x, drop)
    changed = (full - dropped).abs().amax(dim=1) > 1e-7
    assert changed.tolist() == [False, False, True, False]
    torch.manual_seed(3)
    drawn = model(x)
    torch.manual_seed(3)
    noise = torch.rand(model.num_blocks, 2, 4)
    assert torch.equal(drawn, model(x, noise))
    model.eval()
    assert torch.equal(model(x, keep), model(x, drop))


@pytest.mark.parametrize("name", PICO)
def test_recomputation_gives_the_same_gradients(name):
    torch.manual_seed(0)
    model = build(name, img_size=32, num_classes=4, drop_path=0.5)
    x = images(4, 32, 32)

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    for block in model.blocks():
        if block.residual:
            original = block.module.forward
            block.module.forward = lambda *args, original=original: checkpoint(
                original,
                *args,
                use_reentrant=False,
                context_fn=lambda: (torch.enable_grad(), models.layers.recomputing()),
            )
    for grad, reference in zip(gradients(), plain, strict=True):
        assert torch.equal(grad, reference)


def deviates(values, mean, std):
    """Whether a large sample's mean or standard deviation is off by five standard errors."""
    values, count = values.detach().double().flatten(), values.numel()
    far = abs(values.mean() - mean) > 5 * std / count**0.5
    return bool(far) or abs(values.std() / std - 1) > 5 / (2 * count) ** 0.5


def test_transnext_initialisation():
    torch.manual_seed(0)
    model = build("transnext_micro")
    assert not deviates(model.head.weight, 0, 0.02)
    fan_out = model.patch_embed2.proj.out_channels * 9
    assert not deviates(model.patch_embed2.proj.weight, 0, math.sqrt(2 / fan_out))
    assert not deviates(model.patch_embed1.proj.weight, 0, math.sqrt(2 / (48 * 49)))
    block = model.block3[0]
    assert not deviates(block.mlp.dwconv.dwconv.weight, 0, math.sqrt(2 / 9))
    assert not deviates(block.attn.sr.weight, 0, math.sqrt(2 / 192))
    assert not deviates(block.attn.q.weight, 0, 0.02)
    assert not deviates(block.attn.cpb_fc1.weight, 0, 0.02)
    assert not deviates(block.attn.query_embedding, 0, 0.02)
    assert not deviates(block.attn.learnable_tokens, 0, 0.02)
    assert not deviates(block.attn.relative_pos_bias_local, 0, 0.0004)
    assert block.attn.learnable_bias.eq(0).all()
    scale = torch.nn.functional.softplus(block.attn.temperature)
    torch.testing.assert_close(scale, torch.full_like(scale, 1 / 0.24))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert parameter.eq(0).all(), name
        elif "norm" in name.split(".")[-2]:
            assert parameter.eq(1).all(), name


def test_transxnet_initialisation():
    torch.manual_seed(0)
    model = build("transxnet_t")
    block = model.network[4][0]
    unit = block.token_mixer.local_unit
    for weights in (
        model.patch_embed.proj.conv.weight,
        model.classifier[2].weight,
        block.pos_embed.weight,
        block.mlp.fc1[0].weight,
        unit.weight,
        unit.bias,
    ):
        assert not deviates(weights, 0, 0.02)
    for module in model.modules():
        if isinstance(module, models.layers.BatchNorm | torch.nn.GroupNorm):
            assert module.weight.eq(1).all()
    assert block.layer_scale_1.weight.eq(1e-5).all()
    assert all(table.eq(0).all() for table in model.relative_pos_enc)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and "local_unit.bias" not in name:
            assert parameter.eq(0).all(), name


def undecayed(name):
    model = on_meta(name)
    return {n for n, p in model.named_parameters() if model.no_weight_decay(n, p)}


def test_no_weight_decay_rules():
    names = undecayed("transnext_micro")
    attn = "block1.0.attn"
    for kind in ("query_embedding", "relative_pos_bias_local", "temperature", "cpb_fc1.weight"):
        assert f"{attn}.{kind}" in names
    assert {"norm1.weight", "head.bias", f"{attn}.norm.weight"} <= names
    for kind in ("learnable_tokens", "learnable_bias", "sr.weight", "q.weight"):
        assert f"{attn}.{kind}" not in names
    names = undecayed("transxnet_t")
    block = "network.0.0"
    assert f"{block}.token_mixer.local_unit.bias" in names
    assert f"{block}.layer_scale_1.bias" in names
    assert f"{block}.layer_scale_1.weight" not in names
    assert f"{block}.token_mixer.local_unit.weight" not in names
    assert "relative_pos_enc.0" not in names


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("transnext_tinny", {}, "'transnext_tiny'"),
        ("transnext_pico", {"img_size": 0}, "img_size is 0"),
        ("transnext_pico", {"drop_path": 1.0}, "drop_path is 1.0"),
        ("transnext_pico", {"position_mode": "nearest"}, "extrapolate or interpolate"),
        ("transnext_micro", {"fixed_pool_size": 99}, "fixed_pool_size is 99"),
        ("transxnet_t", {"fixed_pool_size": 7}, "transxnet_t has no fixed_pool_size"),
        ("transxnet_t", {"position_mode": "interpolate"}, "transxnet_t has no position_mode"),
    ],
)
def test_user_errors(name, options, message):
    with pytest.raises(ModelError, match=message):
        on_meta(name, **options)


@pytest.mark.parametrize("name", PICO)
def test_half_precision(name):
    torch.manual_seed(0)
    model = build(name, img_size=32, num_classes=4)
    x = images(8, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    logits.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    expected = model.eval()(x)
    lowered = model.bfloat16()(x.bfloat16())
    assert lowered.dtype == torch.bfloat16
    assert (lowered.float() - expected).abs().max() < 0.05 * max(1, expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", PICO)
def test_one_graph_in_training(name, monkeypatch):
    monkeypatch.setitem(MODELS, name, replace(MODELS[name], depths=(1, 1, 1, 1)))
    torch.manual_seed(0)
    model = build(name, img_size=32, num_classes=4, drop_path=0.2)
    x, noise = images(4, 32, 32), torch.rand(model.num_blocks, 2, 4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x, noise)
    expected.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.load_state_dict(state)
    # The backend that captures the graph but leaves out the minutes of code generation.
    logits = torch.compile(model, fullgraph=True, backend="eager")(x, noise)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for parameter, reference in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad - reference).abs().max() <= 1e-3 * max(1, reference.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", PICO)
def test_compiled_code(name):
    """Generated code of one block, the unit that training compiles, gives the eager numbers.

    Its gradients are checked on a GPU: generating them takes minutes of a CPU.
    """
    torch.manual_seed(0)
    model = build(name, img_size=32, num_classes=4).eval()
    block = next(block.module for block in model.blocks() if block.residual)
    place = model.geometry(1) if name == "transnext_pico" else torch.randn(1, 256, 16)
    x = torch.randn(2, 16, 16, model.feature_info[0]["num_chs"])
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True)(x, place, None)
        torch.testing.assert_close(compiled, block(x, place, None), rtol=1e-4, atol=1e-5)


def test_works_under_another_name(tmp_path):
    """The package knows torch and itself alone, so a bundle can carry it under its own name."""
    source = Path(models.__file__).parent
    shutil.copytree(source, tmp_path / "vendored_net", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, torch, vendored_net\n"
        "model = vendored_net.build('transnext_pico', img_size=32, num_classes=3)\n"
        "assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)\n"
        "ours = {'models', 'trainer', 'data', 'launcher', 'timm', 'safetensors'}\n"
        "assert not ours & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
