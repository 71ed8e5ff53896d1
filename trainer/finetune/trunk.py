"""The backbone as heads see it: four maps of images of any size."""

from __future__ import annotations

from torch import Tensor, nn

from models.base import Backbone, ModelError
from models.transxnet import TransXNet
from trainer.backends.wrap import wrap_blocks
from trainer.pretrained import Pretrained
from trainer.sections import MemoryConfig

from .settings import ModelSettings


class Trunk(nn.Module):
    """A backbone without its classifier that follows the size of its images.

    `channels` and `strides` are those of the four maps. TransXNet's maps pass through a group norm
    each, as in the authors' detectors; TransNeXt normalises its stages itself. Raises ModelError
    if the backbone has another number of maps.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if len(backbone.feature_info) != 4:
            raise ModelError(
                f"{type(backbone).__name__} has {len(backbone.feature_info)} feature maps and "
                "heads take four: give a model of Foveate's own, TransNeXt or TransXNet"
            )
        backbone.reset_classifier(0)
        # What is left of the head, such as its norm, sees no gradient: DDP would wait for one.
        backbone.blocks()[-1].module.requires_grad_(False)
        self.backbone = backbone
        self.channels = [int(info["num_chs"]) for info in backbone.feature_info]
        self.strides = [int(info["reduction"]) for info in backbone.feature_info]
        normed = isinstance(backbone, TransXNet)
        self.norms = nn.ModuleList(
            nn.GroupNorm(1, width) if normed else nn.Identity() for width in self.channels
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps [B, channels[i], H_i, W_i] of images [B, 3, H, W].

        A map's side is the image's over its stride, rounded up.
        """
        size = (images.shape[2], images.shape[3])
        if size != self.backbone.size:
            self.backbone.reset_buffers(size)
        maps = self.backbone.forward_features(images)
        return [norm(one) for norm, one in zip(self.norms, maps, strict=True)]


def make_trunk(source: Pretrained, settings: ModelSettings) -> Trunk:
    """Return the trunk of a dense fine-tuning, with the weights of `source`.

    Raises:
        UserError, ModelError: if it cannot be trained on, or not with these settings.
    """
    transnext = source.config.name.startswith("transnext")
    backbone = source.backbone(
        img_size=settings.img_size,
        num_classes=0,
        drop_path=settings.drop_path,
        position_mode=settings.position_mode if transnext else None,
    )
    wrap_blocks(backbone, MemoryConfig(checkpointing=settings.checkpointing))
    return Trunk(backbone)
