"""What transformers expects of a model, put around a backbone; its source goes into bundles."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

from foveate_model import build_model  # type: ignore[import-not-found]  # of a bundle
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention

from models.base import Backbone


class FoveateConfig(BackboneConfigMixin, PreTrainedConfig):
    """Says which of the four maps are wanted, all by default, and how many classes there are."""

    model_type = "foveate"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Take what transformers' own constructor has no place for."""
        self.stage_names = ["stage1", "stage2", "stage3", "stage4"]
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if features is None and indices is None:
            indices = [0, 1, 2, 3]
        self.set_output_features_output_indices(features, indices)
        super().__post_init__(**kwargs)


class FoveatePreTrainedModel(PreTrainedModel):
    """Holds the network as `net`; images may have any size."""

    config_class = FoveateConfig
    base_model_prefix = "net"
    main_input_name = "pixel_values"
    net: Backbone

    def _adopt(self, net: Backbone) -> None:
        self.net = net
        # Models are built without memory here and their tables left behind: the first image's
        # size differs from this one, so that they are computed.
        net.size = (0, 0)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what no weights were given for."""
        if isinstance(module, Backbone):
            module.init_weights()

    def _maps(self, images: Tensor) -> list[Tensor]:
        size = (images.shape[2], images.shape[3])
        if size != self.net.size:
            self.net.reset_buffers(size)
        return self.net.forward_features(images)


class FoveateBackbone(BackboneMixin, FoveatePreTrainedModel):
    """The trunk: `feature_maps` [B, C_i, H_i, W_i] of the stages that the configuration names."""

    has_attentions = False
    # Weights of the head, which is not here.
    _keys_to_ignore_on_load_unexpected = [r"^(net\.)?(head|classifier\.2)\."]  # noqa: RUF012

    def __init__(self, config: FoveateConfig) -> None:
        super().__init__(config)
        self._adopt(build_model(num_classes=0))
        self.num_features = [info["num_chs"] for info in self.net.feature_info]

    def forward(  # type: ignore[override]  # takes transformers' options all the same
        self, pixel_values: Tensor, **_: Any
    ) -> BackboneOutput:
        """Return the maps of normalised images [B, 3, H, W]."""
        maps = self._maps(pixel_values)
        return BackboneOutput(feature_maps=tuple(maps[i] for i in self.config.out_indices))


class FoveateForImageClassification(FoveatePreTrainedModel):
    """The network with its head."""

    def __init__(self, config: FoveateConfig) -> None:
        super().__init__(config)
        self._adopt(build_model(num_classes=config.num_labels))

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Return the logits [B, num_labels] of normalised images [B, 3, H, W].

        With `labels` [B] also their cross-entropy.
        """
        logits = self.net.classify(self._maps(pixel_values)[-1])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


# Heads of transformers find the trunk by its configuration from here on.
AutoConfig.register(FoveateConfig.model_type, FoveateConfig, exist_ok=True)
AutoBackbone.register(FoveateConfig, FoveateBackbone, exist_ok=True)
AutoModelForImageClassification.register(
    FoveateConfig, FoveateForImageClassification, exist_ok=True
)
