"""Bundles: one folder that timm, transformers and torch alone load, with a head or without."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from models.registry import MODELS
from models.timm_model import TimmModel
from models.transnext import TransNeXtConfig

from ..pretrained import Pretrained
from . import preprocessing
from .vendored import MODEL, beside, joined


def write_bundle(source: Pretrained, out: Path) -> None:
    """Write weights, configuration, preprocessing and the code of the model into `out`."""
    model = source.model
    network: nn.Module = model.net if isinstance(model, TimmModel) else model
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    write_configuration(source, out)
    if not isinstance(model, TimmModel):  # timm has the code of its own networks
        write_model_file(source, out)
        (out / "foveate_timm.py").write_text(_for_timm(source))
        code = beside("trainer.exports.transformers_adapter", f".{MODEL}")
        (out / "foveate_transformers.py").write_text(f"{code}\n")


def write_model_file(source: Pretrained, out: Path) -> None:
    """Write the network's code into one file that needs torch alone."""
    (out / f"{MODEL}.py").write_text(model_source(source))


def write_configuration(source: Pretrained, out: Path) -> None:
    """Write config.json, which timm and transformers read, and preprocessor_config.json."""
    config, model = source.config, source.model
    description: dict[str, Any] = {
        "architecture": _timm_name(source),
        "num_classes": config.num_classes,
        "num_features": model.feature_info[-1]["num_chs"],
        "pretrained_cfg": preprocessing.for_timm(source),
        "image_processor_type": preprocessing.PROCESSOR,
        # What Foveate builds it by again.
        "foveate": {"model": asdict(config), "folded": source.folded},
    }
    if isinstance(model, TimmModel):
        description["model_args"] = model.model_args
    else:
        description |= _for_transformers(source)
    (out / "config.json").write_text(json.dumps(description, indent=2))
    processor = preprocessing.for_transformers(source)
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def _timm_name(source: Pretrained) -> str:
    name = source.config.name
    return name.removeprefix("timm:") if name.startswith("timm:") else f"foveate_{name}"


def _for_transformers(source: Pretrained) -> dict[str, Any]:
    classes = {"AutoConfig": "FoveateConfig", "AutoBackbone": "FoveateBackbone"}
    if source.config.num_classes:
        classes["AutoModelForImageClassification"] = "FoveateForImageClassification"
    return {
        "model_type": "foveate",
        "architectures": [list(classes.values())[-1]],
        "auto_map": {auto: f"foveate_transformers.{own}" for auto, own in classes.items()},
        "num_labels": source.config.num_classes,
    }


def model_source(source: Pretrained) -> str:
    """Return one file of Python with the network, which needs nothing of ours."""
    config = source.config
    own = MODELS[config.name]
    family = _family(source)
    size = config.pretrain_size
    settings: dict[str, Any] = {
        "img_size": (config.img_size,) * 2,
        "pretrain_size": None if size is None else (size, size),
        "drop_path": 0.0,
        "num_classes": config.num_classes,
    }
    if isinstance(own, TransNeXtConfig):
        settings |= {
            "pretrain_size": (size or config.img_size,) * 2,
            "fixed_pool_size": config.fixed_pool_size,
            "position_mode": None,
            "layer_scale": config.layer_scale,
        }
    finish = "fold_batch_norm" if source.folded else "lambda model: model"
    modules = [f"models.{family.lower()}", *(["models.fold"] if source.folded else [])]
    return "\n\n".join(
        (
            f'"""{family} as trained by Foveate, in one file. Apache-2.0."""',
            joined([*modules, "trainer.exports.own_model"]),
            f'SETTINGS = {{"config": {own!r}, **{settings!r}}}',
            f"OWN = OwnModel({family}, SETTINGS, {finish})",
            "build_model = OWN.build\nload_model = OWN.load\n",
        )
    )


def _for_timm(source: Pretrained) -> str:
    """Return the file that registers the model with timm."""
    family = _family(source)
    return "\n\n".join(
        (
            beside("trainer.exports.timm_adapter", MODEL),
            f"from functools import partial\n\nfrom {MODEL} import {family}, build_model",
            f"class Timm{family}(TimmBackbone, {family}):\n"
            f'    """{family} under timm\'s names."""\n',
            f"CFG = {preprocessing.for_timm(source)!r}",
            f'register_backbone("{_timm_name(source)}", partial(build_model, Timm{family}), CFG)\n',
        )
    )


def _family(source: Pretrained) -> str:
    return type(MODELS[source.config.name]).__name__.removesuffix("Config")
