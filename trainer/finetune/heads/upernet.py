"""UPerNet (Xiao et al., arXiv:1807.10221): pyramid pooling and a feature pyramid.

The decoder is transformers'; its settings, dropout and initialisation are those that TransNeXt's
published results were trained with.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from ...config import UserError
from ..trunk import Trunk
from .semantic import SemanticHead, classifier, init_convs, pixel_loss, resize

DROPOUT = 0.1
AUXILIARY_STAGE = 3  # whose map is classified by itself, for a gradient in the trunk's middle
AUXILIARY_WEIGHT = 0.4


class UPerNet(SemanticHead):
    """UPerNet with `channels` wide maps; its scores are logits."""

    def __init__(
        self,
        trunk: Trunk,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = 512,
        auxiliary_channels: int = 256,
    ) -> None:
        super().__init__(trunk, num_classes=num_classes, mean=mean, std=std)
        config = UperNetConfig(hidden_size=channels, auxiliary_channels=auxiliary_channels)
        self.decoder: nn.Module = UperNetHead(config, trunk.channels)  # type: ignore[no-untyped-call]
        self.auxiliary = UperNetFCNHead(config, trunk.channels, in_index=AUXILIARY_STAGE - 1)
        for part, width in ((self.decoder, channels), (self.auxiliary, auxiliary_channels)):
            init_convs(part)
            part.register_module("classifier", classifier(width, num_classes, dropout=DROPOUT))

    def losses(self, maps: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the losses `segmentation` and `auxiliary`.

        Raises:
            UserError: if there is one image only to normalise over, in training.
        """
        if self.training and len(labels) == 1 and self._norms_alone():
            raise UserError(
                "UPerNet normalises over the images of a process, and this one has a single image "
                "a step: give it 2 or more"
            )
        return {
            "segmentation": pixel_loss(self.decoder(maps), labels),
            "auxiliary": AUXILIARY_WEIGHT * pixel_loss(self.auxiliary(maps), labels),
        }

    def scores(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the decoder's logits."""
        return resize(self.decoder(maps), size)

    def _norms_alone(self) -> bool:
        """Whether batch norms know the images of this process alone."""
        return any(isinstance(part, nn.BatchNorm2d) for part in self.decoder.modules())
