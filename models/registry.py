"""The models by name, and the one function that builds them.

Invariant: a name fixes everything but input size, pretraining size, drop path and classes. What
follows `timm:` is a name of the timm library's.
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec

import torch

from .base import Backbone, ModelError
from .timm_model import TimmModel
from .transnext import PositionMode, TransNeXt, TransNeXtConfig
from .transxnet import TransXNet, TransXNetConfig

if find_spec("triton"):
    from .kernels import fused as fused

MODELS: dict[str, TransNeXtConfig | TransXNetConfig] = {
    "transnext_pico": TransNeXtConfig(
        widths=(16, 48, 96, 96),
        depths=(1, 1, 2, 1),
        heads=(1, 2, 4, 4),
        mlp_ratios=(4, 4, 4, 4),
        sr_ratios=(4, 2, 1, 1),
        stem_stride=2,
        drop_path=0.0,
    ),
    "transnext_micro": TransNeXtConfig(
        widths=(48, 96, 192, 384), depths=(2, 2, 15, 2), heads=(2, 4, 8, 16), drop_path=0.15
    ),
    "transnext_micro_AAAA": TransNeXtConfig(
        widths=(48, 96, 192, 384),
        depths=(2, 2, 15, 2),
        heads=(2, 4, 8, 16),
        sr_ratios=(16, 8, 4, 2),
        drop_path=0.15,
    ),
    "transnext_tiny": TransNeXtConfig(
        widths=(72, 144, 288, 576), depths=(2, 2, 15, 2), heads=(3, 6, 12, 24), drop_path=0.25
    ),
    "transnext_small": TransNeXtConfig(
        widths=(72, 144, 288, 576), depths=(5, 5, 22, 5), heads=(3, 6, 12, 24), drop_path=0.45
    ),
    "transnext_base": TransNeXtConfig(
        widths=(96, 192, 384, 768), depths=(5, 5, 23, 5), heads=(4, 8, 16, 32), drop_path=0.6
    ),
    "transnext_large": TransNeXtConfig(
        widths=(144, 288, 576, 1152), depths=(5, 5, 23, 5), heads=(6, 12, 24, 48), drop_path=0.6
    ),
    "transnext_huge": TransNeXtConfig(
        widths=(192, 384, 768, 1536), depths=(6, 6, 40, 6), heads=(6, 12, 24, 48), drop_path=0.6
    ),
    "transnext_giant": TransNeXtConfig(
        widths=(384, 768, 1536, 3072), depths=(6, 6, 42, 6), heads=(12, 24, 48, 96), drop_path=0.6
    ),
    "transxnet_pico": TransXNetConfig(
        widths=(32, 64, 96, 128),
        depths=(1, 2, 2, 1),
        groups=(2, 2, 2, 2),
        heads=(1, 2, 3, 4),
        mlp_ratios=(4, 4, 3, 2),
        sr_ratios=(4, 2, 1, 1),
        kernel=3,
        stem_stride=2,
        layer_scale=0.1,
        drop_path=0.0,
        pretrain_size=32,
    ),
    "transxnet_t": TransXNetConfig(
        widths=(48, 96, 224, 448),
        depths=(3, 3, 9, 3),
        groups=(2, 2, 2, 2),
        heads=(1, 2, 4, 8),
        drop_path=0.1,
    ),
    "transxnet_s": TransXNetConfig(
        widths=(64, 128, 320, 512),
        depths=(4, 4, 12, 4),
        groups=(2, 2, 3, 4),
        heads=(1, 2, 5, 8),
        mlp_ratios=(6, 6, 4, 4),
        drop_path=0.2,
    ),
    "transxnet_b": TransXNetConfig(
        widths=(76, 152, 336, 672),
        depths=(4, 4, 21, 4),
        groups=(2, 2, 4, 4),
        heads=(2, 4, 8, 16),
        mlp_ratios=(8, 8, 4, 4),
        drop_path=0.4,
    ),
    "transxnet_large": TransXNetConfig(
        widths=(128, 256, 512, 1024),
        depths=(4, 4, 24, 4),
        groups=(2, 2, 4, 4),
        heads=(2, 4, 8, 16),
        mlp_ratios=(8, 8, 4, 4),
        drop_path=0.5,
    ),
    "transxnet_huge": TransXNetConfig(
        widths=(192, 384, 896, 1792),
        depths=(6, 6, 36, 6),
        groups=(2, 2, 4, 4),
        heads=(3, 6, 14, 28),
        mlp_ratios=(8, 8, 4, 4),
        drop_path=0.6,
    ),
}


def build(
    name: str,
    *,
    img_size: int | tuple[int, int] = 224,
    pretrain_size: int | tuple[int, int] | None = None,
    fixed_pool_size: int | None = None,
    position_mode: PositionMode | None = None,
    layer_scale: float | None = None,
    drop_path: float | None = None,
    num_classes: int = 1000,
) -> Backbone:
    """Build the backbone `name` for images of `img_size` (a side, or height and width).

    The options are explained at `TransNeXt`, `TransXNet` and `TimmModel`; `pretrain_size` is not
    timm's, `fixed_pool_size`, `position_mode` and `layer_scale` are TransNeXt's alone. `drop_path`
    None means the published rate (of timm's models: 0), `num_classes` 0 a backbone without its
    linear head. The model is initialised on the default device; on the meta device `to_empty`,
    `init_weights` and `reset_buffers` follow. Raises ModelError for an unknown name and for
    options that do not fit the model.
    """
    family, rate, known = _family(name)
    given = {
        "pretrain_size": None if pretrain_size is None else _pair("pretrain_size", pretrain_size),
        "fixed_pool_size": fixed_pool_size,
        "position_mode": position_mode,
        "layer_scale": layer_scale,
    }
    foreign = [
        f"{option} (got {value!r})"
        for option, value in given.items()
        if value is not None and option not in known
    ]
    if foreign:
        raise ModelError(f"{name} has no {' and no '.join(foreign)}; leave it out")
    device = torch.get_default_device()
    with torch.device("meta"):
        model = family(
            img_size=_pair("img_size", img_size),
            drop_path=rate if drop_path is None else drop_path,
            num_classes=max(num_classes, 1),
            **{option: given[option] for option in known},
        )
        if num_classes == 0:
            model.reset_classifier(0)
    if device.type != "meta":
        model.to_empty(device=device)
        model.init_weights()
        model.reset_buffers(model.size)
    return model


def _family(name: str) -> tuple[Callable[..., Backbone], float, tuple[str, ...]]:
    """What makes the model `name`, its published drop path, and which options are its own."""
    if name.startswith("timm:"):
        return partial(TimmModel, name.removeprefix("timm:")), 0.0, ()
    if name not in MODELS:
        nearest = get_close_matches(name, MODELS, n=1, cutoff=0) or [""]
        raise ModelError(f"unknown model {name!r}; the nearest is {nearest[0]!r}")
    config = MODELS[name]
    if isinstance(config, TransXNetConfig):
        return partial(TransXNet, config), config.drop_path, ("pretrain_size",)
    options = ("pretrain_size", "fixed_pool_size", "position_mode", "layer_scale")
    return partial(TransNeXt, config), config.drop_path, options


def _pair(option: str, size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ModelError(f"{option} is {size}; both sides must be at least 1 pixel")
    return height, width
