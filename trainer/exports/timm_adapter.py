"""What timm expects of a model, put around a backbone; its source goes into exported bundles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from models.base import Backbone, ModelError


class TimmBackbone(Backbone):
    """Mixed in before a family, it answers to timm's names and takes any input size."""

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the last stage's map [B, C, H, W] of images [B, 3, H, W]."""
        return self._all_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes] of the last map, or what the classifier sees of it."""
        return self.pool(x) if pre_logits else self.classify(x)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return logits [B, num_classes] of images [B, 3, H, W]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the stage maps that `indices` names, after the last map unless only they count.

        Raises:
            ModelError: if another format than NCHW is asked for.
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt is {output_fmt!r}: these features are NCHW")
        maps = self._all_stages(x)
        chosen = [maps[index] for index in _stage_indices(indices)]
        return chosen if intermediates_only else (maps[-1], chosen)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the classifier where only features are wanted; return the stages meant."""
        if prune_head:
            self.reset_classifier(0)
        return _stage_indices(indices)

    @property
    def num_features(self) -> int:
        """Channels of the last stage's map."""
        return int(self.feature_info[-1]["num_chs"])

    def get_classifier(self) -> nn.Module:
        """Return the linear layer behind the logits."""
        module = self.blocks()[-1].module
        return module[-1] if isinstance(module, nn.Sequential) else module

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse: bundles run forward and fine-tune without recomputation."""
        if enable:
            raise ModelError("gradient checkpointing is not part of an exported bundle")

    def _all_stages(self, x: Tensor) -> list[Tensor]:
        size = (x.shape[2], x.shape[3])
        if size != self.size:
            self.reset_buffers(size)
        return self.stages(x, self._noise(x, None))


def _stage_indices(indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """Spell timm's way of naming stages out: None is all, a number is that many last ones."""
    if indices is None:
        return [0, 1, 2, 3]
    if isinstance(indices, int):
        return list(range(4))[-indices:]
    return [index % 4 for index in indices]


def register_backbone(name: str, family: Callable[..., Backbone], cfg: dict[str, Any]) -> None:
    """Register a timm entry point `name` that builds `family(…)`; `cfg` is timm's description."""

    def construct(in_chans: int = 3, **options: Any) -> nn.Module:
        if in_chans != 3:
            raise ModelError(f"in_chans is {in_chans}: {name} takes images of 3 channels")
        model = family(**options)
        model.init_weights()
        return model

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        size = options.pop("img_size", None) or tuple(cfg["input_size"][1:])
        options["img_size"] = (size, size) if isinstance(size, int) else size
        options["drop_path"] = options.pop("drop_path_rate", 0.0)
        model: nn.Module = build_model_with_cfg(
            construct,
            name,
            pretrained,
            feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2, 3)},
            **options,
        )
        return model

    create.__name__, create.__module__ = name, __name__
    globals().setdefault("default_cfgs", {}).update(generate_default_cfgs({name: cfg}))
    register_model(create)
