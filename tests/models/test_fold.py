"""Batch norms folded into their neighbours: the same outputs without them."""

import pytest
import torch

from models import build
from models.base import ModelError
from models.fold import fold_batch_norm
from models.layers import BatchNorm


def randomised(name, dtype, **options):
    """A model in evaluation with random parameters and statistics."""
    torch.manual_seed(0)
    model = build(name, **options).to(dtype).eval()
    norms = ("bn.", "norm.", ".fc", ".proj.")
    for key, value in model.state_dict().items():
        if value.is_floating_point() and any(part in key for part in norms):
            noise = torch.randn_like(value)
            value.copy_(noise.abs() + 0.5 if key.endswith("running_var") else value + noise / 9)
    return model


def num_norms(model):
    return sum(isinstance(module, BatchNorm) for module in model.modules())


@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
@torch.no_grad()
def test_same_outputs(size):
    model = randomised("transxnet_pico", torch.float64, img_size=64, num_classes=5)
    model.reset_buffers(size)
    names = set(model.state_dict())
    folded = fold_batch_norm(model)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for stage, reference in zip(folded.forward_features(x), model.forward_features(x), strict=True):
        torch.testing.assert_close(stage, reference, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert set(model.state_dict()) == names


@torch.no_grad()
def test_one_norm_a_block_remains():
    model = randomised("transxnet_t", torch.float32)
    folded = fold_batch_norm(model)
    assert num_norms(model) == 160
    assert num_norms(folded) == model.num_blocks == 18
    assert all(n.endswith("mlp.fc1.2") for n, m in folded.named_modules() if type(m) is BatchNorm)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_training_is_refused():
    folded = fold_batch_norm(build("transxnet_pico", img_size=32, num_classes=3))
    assert not any(module.training for module in folded.modules())
    assert not folded.eval().training
    with pytest.raises(ModelError, match="cannot be trained"):
        folded.train()


def test_folded_weights_load_into_a_folded_skeleton():
    """As a bundle is read: fold a model without weights, then load the folded ones."""
    folded = fold_batch_norm(
        randomised("transxnet_pico", torch.float32, img_size=32, num_classes=3)
    )
    with torch.device("meta"):
        skeleton = fold_batch_norm(build("transxnet_pico", img_size=32, num_classes=3))
    skeleton.load_state_dict(folded.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(skeleton(x), folded(x))


def test_a_model_without_batch_norm_is_copied():
    model = build("transnext_pico", img_size=32, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fold_batch_norm(model)(x), model(x))
