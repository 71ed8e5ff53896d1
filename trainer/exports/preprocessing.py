"""How images become inputs: the run's evaluation preprocessing in other libraries' words."""

from __future__ import annotations

from typing import Any

from models.timm_model import TimmModel

from ..pretrained import Pretrained


def for_timm(source: Pretrained) -> dict[str, Any]:
    """Return timm's `pretrained_cfg`."""
    config, model = source.config, source.model
    size, squash = config.img_size, config.squash
    if isinstance(model, TimmModel):
        own = {name: model.net.pretrained_cfg[name] for name in ("classifier", "first_conv")}
    else:
        first, *_ = (name for name, _ in model.named_parameters())
        own = {"classifier": _classifier(source), "first_conv": first.removesuffix(".weight")}
    return {
        **own,
        "input_size": [3, size, size],
        "fixed_input_size": isinstance(model, TimmModel) and "img_size" in model.model_args,
        "num_classes": config.num_classes,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if squash else source.crop_pct,
        "crop_mode": "squash" if squash else "center",
        "mean": list(source.mean),
        "std": list(source.std),
        "license": "apache-2.0",
    }


def _classifier(source: Pretrained) -> str | None:
    """Return the name of the linear layer behind the logits, if there is one."""
    names = [name for name, p in source.model.named_parameters() if p.shape[0] == p.numel()]
    return names[-1].removesuffix(".bias") if source.config.num_classes else None


PROCESSOR = "ConvNextImageProcessor"  # transformers': resize, cut the centre out; from 384 on, warp


def for_transformers(source: Pretrained) -> dict[str, Any]:
    """Return the content of preprocessor_config.json."""
    return {
        "image_processor_type": PROCESSOR,
        "do_resize": True,
        "size": {"shortest_edge": source.config.img_size},
        "crop_pct": source.crop_pct,
        "resample": 3,  # bicubic, by Pillow's number
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.mean),
        "image_std": list(source.std),
    }
