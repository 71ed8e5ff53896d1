"""Semantic FPN against its description, computed step by step."""

import pytest
import torch
from torch.nn import functional as F

from models.registry import build
from tests.trainer.finetune.drawings import MEAN, STD, parameter_count, small
from trainer.finetune.heads.semantic_fpn import SemanticFPN
from trainer.finetune.trunk import Trunk


def _up(x, **options):
    return F.interpolate(x, mode="bilinear", align_corners=False, **options)


def test_the_logits_are_those_of_the_paper():
    model = small("semantic_fpn").eval()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_var, 0.5, 2.0)
            torch.nn.init.normal_(part.running_mean)
    images = torch.rand(1, 3, 64, 64)
    weights = model.state_dict()

    def conv(x, name, padding=0):
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    def conv_norm_relu(x, name, index):
        mean, var, gain, bias = (
            weights[f"{name}.{index + 1}.{key}"]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(conv(x, f"{name}.{index}", 1), mean, var, gain, bias).relu()

    with torch.no_grad():
        maps = model.trunk((images - model.mean) / model.std)
        top, total = None, 0
        for level in (3, 2, 1, 0):
            lateral = conv(maps[level], f"pyramid.inner_blocks.{level}.0")
            top = lateral if top is None else lateral + F.interpolate(top, scale_factor=2)
            x = conv(top, f"pyramid.layer_blocks.{level}.0", padding=1)
            x = conv_norm_relu(x, f"branches.{level}", 0)
            for doubling in range(level):
                x = _up(x, scale_factor=2)
                if doubling + 1 < level:
                    x = conv_norm_relu(x, f"branches.{level}", 4 * (doubling + 1))
            total = total + x
        expected = _up(conv(total, "classifier.1"), size=(64, 64))
        assert torch.allclose(model(images), expected, atol=1e-5)


def test_the_size_is_that_of_its_parts():
    """Pyramid 256 wide, branches 128 wide: a convolution each, and one for each doubling."""
    with torch.device("meta"):
        trunk = Trunk(build("transxnet_t", img_size=512, pretrain_size=224))
        model = SemanticFPN(trunk, num_classes=150, mean=MEAN, std=STD)
    laterals = sum(256 * width + 256 for width in trunk.channels)
    outputs = 4 * (9 * 256 * 256 + 256)
    first, further = 9 * 256 * 128 + 2 * 128, 9 * 128 * 128 + 2 * 128
    classes = 128 * 150 + 150
    expected = laterals + outputs + 4 * first + 3 * further + classes
    assert parameter_count(model) - parameter_count(trunk) == expected
    assert parameter_count(model) == pytest.approx(17e6, rel=0.03)
