"""timm's classifiers as backbones: timm's numbers, and the contract that the trainer relies on."""

import copy
import sys

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import build
from models.base import ModelError
from models.layers import BatchNorm, recomputing

# One of each kind: global tokens, convolutions, both, windows, two branches, shared drop paths.
SMALL = {
    "test_vit": 32,
    "test_resnet": 32,
    "test_efficientnet": 32,
    "swin_tiny_patch4_window7_224": 64,
    "crossvit_9_240": 240,
    "xcit_nano_12_p16_224": 32,
}
DESCRIBED = {
    **SMALL,
    "swin_base_patch4_window7_224": 224,
    "crossvit_base_240": 240,
    "resnet50": 224,
    "convnext_tiny": 224,
    "pit_ti_224": 224,  # timm itself names no groups in it
    "nest_tiny": 224,
    "coat_lite_mini": 224,  # its blocks share parameters
    "vgg11": 224,  # it has no drop path
}


def on_meta(name, **options):
    with torch.device("meta"):
        return build(f"timm:{name}", **options)


def small(name, **options):
    torch.manual_seed(0)
    return build(f"timm:{name}", img_size=SMALL[name], num_classes=5, **options)


def images(name, batch):
    size = SMALL[name]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", DESCRIBED)
def test_blocks_cover_every_parameter_once(name):
    model = on_meta(name, img_size=DESCRIBED[name])
    blocks = model.blocks()
    described = [
        f"{block.name}.{parameter}"
        for block in blocks
        for parameter, _ in block.module.named_parameters()
    ]
    assert sorted(described) == sorted(parameter for parameter, _ in model.named_parameters())
    for block in blocks:
        if not isinstance(block.module, nn.ParameterDict):  # parameters with no module of their own
            assert model.get_submodule(block.name) is block.module
    assert [block.stage for block in blocks] == sorted(block.stage for block in blocks)
    assert {block.stage for block in blocks} <= {1, 2, 3, 4}
    residual = [block.depth for block in blocks if block.residual]
    if name not in ("coat_lite_mini", "vgg11"):
        assert residual == list(range(model.num_blocks))
        assert blocks[-1].depth == model.num_blocks
    else:
        assert len(blocks) == 1
        assert residual == []


def test_blocks_are_what_repeats():
    swin = on_meta("swin_base_patch4_window7_224").blocks()
    assert [block.stage for block in swin if block.residual] == [1] * 2 + [2] * 2 + [3] * 18 + [
        4
    ] * 2
    assert [block.name for block in swin if not block.residual] == [
        "net.patch_embed",
        *(f"net.layers.{stage}.downsample" for stage in (1, 2, 3)),
        "net.norm",
        "net.head",
    ]
    cross = on_meta("crossvit_9_240", img_size=240).blocks()
    assert sum(block.residual for block in cross) == 3 * (1 + 3 + 2)


def test_drop_path_is_timms():
    model = on_meta("swin_base_patch4_window7_224", drop_path=0.46)
    assert model.drop_path == pytest.approx([0.02 * depth for depth in range(24)])
    assert set(on_meta("swin_base_patch4_window7_224").drop_path) == {0.0}


@pytest.mark.parametrize("name", SMALL)
def test_meta_device_gives_timms_own_model(name):
    """Weights, computed buffers and outputs are those of timm under the same seed."""
    deferred = on_meta(name, img_size=SMALL[name], num_classes=5)
    assert all(tensor.is_meta for tensor in tensors(deferred).values())
    deferred.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in tensors(deferred).values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
    torch.manual_seed(0)
    deferred.init_weights()
    deferred.reset_buffers(deferred.size)
    direct = small(name)
    torch.manual_seed(0)
    size = {} if "net" in name else {"img_size": SMALL[name]}
    reference = timm.create_model(name, num_classes=5, **size)
    expected = tensors(reference)
    for model in (deferred, direct):
        found = tensors(model)
        assert list(found) == [f"net.{key}" for key in expected]
        assert all(torch.equal(found[f"net.{key}"], value) for key, value in expected.items())
    x = images(name, 2)
    assert torch.equal(deferred.eval()(x), direct.eval()(x))
    torch.testing.assert_close(direct(x), reference.eval()(x))
    features = direct.forward_features(x)
    assert torch.equal(direct.classify(features[-1]), direct(x))
    assert direct.pool(features[-1]) is not None


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "test_resnet"])
def test_loading_needs_no_initialisation(name):
    model = small(name).eval()
    empty = on_meta(name, img_size=SMALL[name], num_classes=5).to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    state = torch.get_rng_state()
    empty.reset_buffers(empty.size)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(empty(images(name, 2)), model(images(name, 2)))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "levit_128s"])
def test_batch_norm_is_ours_with_timms_numbers(name):
    size = SMALL.get(name, 224)
    torch.manual_seed(0)
    model = build(f"timm:{name}", img_size=size, num_classes=5)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    assert any(isinstance(m, BatchNorm) for m in model.modules())
    options = {"img_size": size} if name == "levit_128s" else {}
    reference = timm.create_model(name, num_classes=5, **options).train()
    reference.load_state_dict(model.net.state_dict())
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(model.net.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def hold_statistics(model):
    """Batch statistics would let the samples see one another."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()


# None of the residual branches of test_efficientnet has a skip, without which timm drops nothing.
@pytest.mark.parametrize("name", [name for name in SMALL if name != "test_efficientnet"])
def test_drop_noise_decides_per_sample(name):
    model = small(name, drop_path=0.5)
    hold_statistics(model)
    with torch.no_grad():  # timm starts some branches, and class tokens, at or near zero
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    x = images(name, 4)
    keep = torch.full((model.num_blocks, 2, 4), 0.99)
    drop = keep.clone()
    drop[:, :, 2] = 0.01
    full, dropped = model(x, keep), model(x, drop)
    changed = (full - dropped).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == [False, False, True, False]
    # What a sample meets depends on its own noise alone, however the batch is divided.
    noise = torch.rand(model.num_blocks, 2, 4)
    halves = [model(x[part], noise[:, :, part]) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(torch.cat(halves), model(x, noise), rtol=1e-4, atol=1e-4)
    torch.manual_seed(3)
    drawn = model(x)
    torch.manual_seed(3)
    assert torch.equal(drawn, model(x, torch.rand(model.num_blocks, 2, 4)))
    model.eval()
    assert torch.equal(model(x, keep), model(x, drop))


def test_every_branch_of_a_block_has_numbers_of_its_own():
    """XCiT's blocks call one drop path three times; the third number is a hash of the others."""
    model = small("xcit_nano_12_p16_224", drop_path=0.5)
    noise = model._noises["net.blocks.11"]
    noise.values = torch.rand(2, 20_000)
    branches = torch.stack([noise.next(20_000) for _ in range(4)])
    assert torch.equal(branches[:2], noise.values)
    assert branches.min() >= 0
    assert branches.max() < 1
    assert (branches.mean(dim=1) - 0.5).abs().max() < 0.01
    correlation = torch.corrcoef(branches) - torch.eye(4)
    assert correlation.abs().max() < 0.04


def test_folded_batches_share_their_samples_numbers():
    noise = next(iter(small("test_vit", drop_path=0.5)._noises.values()))
    noise.values = torch.tensor([[0.1, 0.9], [0.2, 0.8]])
    assert noise.next(6).tolist() == pytest.approx([0.1] * 3 + [0.9] * 3)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "xcit_nano_12_p16_224"])
def test_recomputation_gives_the_same_gradients(name):
    model = small(name, drop_path=0.5)
    plain, recomputed = model, copy.deepcopy(model)
    for block in recomputed.blocks():
        if block.residual:
            original = block.module.forward
            block.module.forward = lambda *args, original=original: checkpoint(
                original,
                *args,
                use_reentrant=False,
                context_fn=lambda: (torch.enable_grad(), recomputing()),
            )
    x, noise = images(name, 4), torch.rand(model.num_blocks, 2, 4)
    for each in (plain, recomputed):
        each(x, noise).square().sum().backward()
    for parameter, reference in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, reference.grad)
    for key, value in plain.state_dict().items():
        assert torch.equal(recomputed.state_dict()[key], value), key


@pytest.mark.parametrize("name", SMALL)
def test_learns(name):
    model = small(name, drop_path=0.1)
    x, y = images(name, 4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_block_compiles_to_one_graph(name):
    model = small(name, drop_path=0.5)
    x, noise = images(name, 4), torch.rand(model.num_blocks, 2, 4)
    expected = model(x, noise)
    again = small(name, drop_path=0.5)
    for block in again.blocks():
        if block.residual:
            # The backend that captures the graph, and leaves out the minutes of code generation.
            block.module.forward = torch.compile(
                block.module.forward, fullgraph=True, backend="eager"
            )
    torch.testing.assert_close(again(x, noise), expected)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", DESCRIBED)
def test_no_weight_decay_is_timms_rule(name):
    model = on_meta(name, img_size=DESCRIBED[name])
    listed = getattr(model.net, "no_weight_decay", tuple)()
    decayed = timm.optim.param_groups_weight_decay(model.net, 0.1, no_weight_decay_list=listed)[1]
    expected = {id(parameter) for parameter in decayed["params"]}
    found = {id(p) for n, p in model.named_parameters() if not model.no_weight_decay(n, p)}
    assert found == expected


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "crossvit_9_240"])
def test_another_head(name):
    model = small(name).eval()
    x = images(name, 2)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    headless = build(f"timm:{name}", img_size=SMALL[name], num_classes=0).eval()
    model.reset_classifier(0)
    assert model(x).shape == headless(x).shape
    model.reset_classifier(5)
    model.init_weights()
    assert model(x).shape == (2, 5)


def test_sizes():
    free = small("test_resnet").eval()
    free.reset_buffers((48, 64))
    assert free(torch.zeros(1, 3, 48, 64)).shape == (1, 5)
    fixed = small("test_vit")
    with pytest.raises(ModelError, match=r"test_vit is built for images of \(32, 32\) pixels"):
        fixed.reset_buffers((48, 48))
    with pytest.raises(ModelError, match=r"\[B, 3, 32, 32\]"):
        fixed(torch.zeros(1, 3, 48, 48))
    # What a bundle has to tell timm, so that it builds the same network again.
    assert (free.model_args, fixed.model_args) == ({}, {"img_size": 32})
    oblong = build("timm:test_vit", img_size=(32, 64), num_classes=5)
    assert oblong(torch.zeros(1, 3, 32, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swin_bse_patch4_window7_224", {}, "the nearest is 'timm:swin_base_patch4_window7_224'"),
        ("resnet50.a1_in1k", {}, "the nearest is 'timm:resnet50"),
        ("hf-hub:timm/resnet50", {}, "unknown model 'timm:hf-hub:timm/resnet50'"),
        ("vgg11", {"drop_path": 0.1}, "timm:vgg11 has no drop path: drop_path is 0.1"),
        ("test_vit", {"drop_path": 1.0}, "drop_path is 1.0"),
        ("test_vit", {"img_size": 0}, "img_size is 0"),
        ("nest_tiny", {"img_size": 50}, "timm cannot build nest_tiny for images of (50, 50)"),
        ("test_vit", {"pretrain_size": 32}, "timm:test_vit has no pretrain_size"),
        ("test_vit", {"fixed_pool_size": 7}, "timm:test_vit has no fixed_pool_size"),
    ],
)
def test_user_errors(name, options, message):
    with pytest.raises(ModelError) as caught:
        on_meta(name, **options)
    assert message in str(caught.value)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"need the timm library .*; install it: pip install"):
        on_meta("resnet50")
