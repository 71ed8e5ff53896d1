"""Weights to start from: every kind of source gives the network that it was written from."""

from dataclasses import replace

import pytest
import torch

from models.base import ModelError
from models.convert import save_official
from models.registry import build
from trainer.config import UserError
from trainer.finetune.trunk import Trunk
from trainer.pretrained import pretrained


def saved(path, name, layout="classification", **options):
    """A model of random weights in the authors' file."""
    torch.manual_seed(1)
    model = build(name, img_size=32, drop_path=0.0, **options).eval()
    save_official(model, path, layout=layout)
    return model


@pytest.mark.parametrize("name", ["transnext_pico", "transxnet_pico"])
@pytest.mark.parametrize("layout", ["classification", "dense"])
def test_a_file_of_the_authors_names_its_model_itself(name, layout, tmp_path):
    model = saved(tmp_path / "net.pth", name, layout, num_classes=7)
    found = pretrained(tmp_path / "net.pth")
    assert found.config.name == name
    assert found.trained
    assert found.model.num_classes == (7 if layout == "classification" else 0)
    weights = dict(model.named_parameters())
    for key, value in found.model.named_parameters():
        if layout == "classification" or not key.startswith(model.blocks()[-1].name):
            assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("name", ["transnext_pico", "transxnet_pico"])
def test_another_number_of_classes_gets_a_fresh_head_on_the_same_weights(name, tmp_path):
    model = saved(tmp_path / "net.pth", name, num_classes=7)
    source = pretrained(tmp_path / "net.pth")
    images = torch.randn(2, 3, 32, 32)
    same = source.backbone(img_size=32, num_classes=7).eval()
    other = source.backbone(img_size=32, num_classes=3, drop_path=0.1).eval()
    with torch.no_grad():
        assert same(images).shape == (2, 7)
        assert other(images).shape == (2, 3)
        weights = model.state_dict()
        head = model.blocks()[-1].name
        for key, value in other.state_dict().items():
            if not key.startswith(head):
                assert torch.equal(value, weights[key]), key
    assert other.drop_path[-1] == pytest.approx(0.1)


def test_a_name_is_an_untrained_model():
    found = pretrained("transnext_pico")
    assert not found.trained
    assert found.checkpoint is None


def test_what_is_no_source_is_one_clear_message(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist: give a run folder"):
        pretrained("nowhere")
    (tmp_path / "net.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"cannot read weights from .*net\.safetensors"):
        pretrained(tmp_path / "net.safetensors")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="fits none of the models"):
        pretrained(tmp_path / "other.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="neither a run folder nor a whole checkpoint"):
        pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match="chooses among a run's weights"):
        pretrained("transnext_pico", weights="ema")


@pytest.mark.parametrize("name", ["transnext_pico", "transxnet_pico"])
def test_a_trunk_follows_the_size_of_its_images(name):
    trunk = Trunk(pretrained(name).backbone(img_size=32, num_classes=0)).train()
    for height, width in ((32, 32), (40, 56)):
        maps = trunk(torch.randn(2, 3, height, width))
        for map_, channels, stride in zip(maps, trunk.channels, trunk.strides, strict=True):
            assert map_.shape == (2, channels, -(-height // stride), -(-width // stride))
    sum(map_.sum() for map_ in maps).backward()
    without = [
        key for key, value in trunk.named_parameters() if value.requires_grad and value.grad is None
    ]
    assert without == []


def test_folded_batch_norms_cannot_be_trained(tmp_path):
    source = replace(pretrained("transxnet_pico"), folded=True)
    with pytest.raises(UserError, match="for evaluation alone"):
        source.backbone(img_size=32, num_classes=0)


def test_heads_take_no_backbone_without_four_maps():
    with pytest.raises(ModelError, match="heads take four"):
        Trunk(build("timm:test_resnet", img_size=32, drop_path=0.0))
