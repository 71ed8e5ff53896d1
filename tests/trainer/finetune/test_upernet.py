"""UPerNet against transformers' own assembly of it, and the size that is published."""

import pytest
import torch
from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation
from transformers.modeling_outputs import BackboneOutput

from models.registry import build
from tests.trainer.finetune.drawings import MEAN, STD, drawn, parameter_count, small
from trainer.config import UserError
from trainer.finetune.heads.upernet import UPerNet
from trainer.finetune.trunk import Trunk


def test_transnext_tiny_has_the_published_size():
    with torch.device("meta"):
        trunk = Trunk(build("transnext_tiny", img_size=512, pretrain_size=224))
        model = UPerNet(trunk, num_classes=150, mean=MEAN, std=STD)
    assert parameter_count(model) == pytest.approx(59e6, rel=0.01)


class _Maps(torch.nn.Module):
    """A backbone as transformers' model calls it, which returns given maps."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward_with_filtered_kwargs(self, images, **options):
        return BackboneOutput(feature_maps=self.maps)


def test_scores_and_losses_are_those_of_transformers():
    images, labels = drawn(2)
    labels[labels == 255] = 0
    model = small("upernet").eval()
    maps = model.trunk((images - model.mean) / model.std)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=model.trunk.channels, depths=[1] * 4, layer_type="basic"
    )
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=3
    )
    theirs = UperNetForSemanticSegmentation(config).eval()
    theirs.backbone = _Maps(maps)
    pairs = ((model.decoder, theirs.decode_head), (model.auxiliary, theirs.auxiliary_head))
    for own, other in pairs:
        weights = own.state_dict().items()
        other.load_state_dict({key.replace("classifier.1", "classifier"): v for key, v in weights})
    with torch.no_grad():
        expected = theirs(images, labels=labels)
        losses = model(images, labels)
        assert torch.allclose(model(images), expected.logits, atol=1e-6)
    assert sum(losses.values()).item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_a_single_image_cannot_be_normalised():
    images, labels = drawn(1)
    model = small("upernet").train()
    with pytest.raises(UserError, match="a single image a step: give it 2 or more"):
        model(images, labels)
    model.eval()(images, labels)  # which needs none


def test_channels_are_dropped_in_training_alone():
    images, labels = drawn(2)
    model = small("upernet")
    losses = {model.train()(images, labels)["segmentation"].item() for _ in range(3)}
    assert len(losses) == 3
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    scores = {model.eval()(images).sum().item() for _ in range(3)}
    assert len(scores) == 1
