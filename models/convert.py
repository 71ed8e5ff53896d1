"""Official checkpoint files into models, and models into official checkpoint files.

Names need no translation: `state_dict()` carries the official ones. A file has one of two layouts:
classification, or dense, as detectors and segmentors hold it: the trunk without a head, and for
TransXNet with a group norm on each output that our backbones, which return the outputs
themselves, do not have.
Invariant: files are never unpickled, and a model is filled completely or not at all.
"""

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .base import Backbone, ModelError
from .registry import MODELS, build
from .timm_model import TimmModel
from .transnext import TransNeXt
from .transxnet import TransXNet

Layout = Literal["classification", "dense"]

# Where training scripts put the weights, the averaged ones (which are evaluated) first.
CONTAINERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")
TRUNK = "backbone."  # of a detector or segmentor; its other entries are not the backbone's
OUTPUT_NORM = re.compile(r"norm[0246]\.(weight|bias)")  # of the dense TransXNet


def load_weights(model: Backbone, path: str | Path) -> list[str]:
    """Fill `model` from a checkpoint file; return the entries of the file that it has no use for.

    See `read_weights`. A file of the dense layout fills a model without a head (`num_classes` 0);
    TransXNet's output norms are then what is returned, and the norm of the head that the model
    lacks stays as it is. Raises ModelError that lists the missing, unknown and misshapen entries
    if the file does not fit, with the model that it would fit if that is one of MODELS.
    """
    weights = read_weights(path)
    fitting, problems = _fit(model, weights)
    if problems:
        raise ModelError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. {_advice(weights)}"
        )
    _named(model).load_state_dict(fitting, strict=False)
    return [name for name in weights if name not in fitting]


def save_official(model: Backbone, path: str | Path, *, layout: Layout = "classification") -> None:
    """Write a checkpoint file that the official code reads, and safe loading (weights_only) too.

    TransNeXt's classifier reads `{"model": ...}`; TransXNet's, which is timm's, and both dense
    models (by mmcv) read `{"state_dict": ...}`. See `official_state` for what is in it.
    Raises ModelError if the model has no such layout or the file cannot be written.
    """
    state = official_state(model, layout=layout)
    bare = isinstance(model, TransNeXt) and layout == "classification"
    content = {"model" if bare else "state_dict": {k: v.cpu() for k, v in state.items()}}
    try:
        torch.save(content, path)
    except (OSError, RuntimeError) as error:  # torch reports a missing folder as the latter
        raise ModelError(f"cannot write weights to {path}: {error}") from error


def official_state(model: Backbone, *, layout: Layout) -> dict[str, Tensor]:
    """The state dict that the official model of this layout has, by name and in its order.

    Dense leaves the head out. For TransXNet it adds the output norms as identities (weight 1,
    bias 0), which is what official training starts from. Raises ModelError if the model has no
    such layout.
    """
    state: dict[str, Tensor] = dict(_named(model).state_dict())
    if layout not in get_args(Layout):
        raise ModelError(f"layout is {layout!r}; it must be {' or '.join(get_args(Layout))}")
    if layout == "classification":
        if model.num_classes == 0:
            raise ModelError(f"{type(model).__name__} has no head; write it with layout dense")
        return state
    if isinstance(model, TimmModel):
        raise ModelError(f"timm:{model.name} has no dense layout; write it as classification")
    head = _head(model)
    state = {name: value for name, value in state.items() if not name.startswith(head)}
    if isinstance(model, TransXNet):
        for place, info in zip((0, 2, 4, 6), model.feature_info, strict=True):
            state[f"norm{place}.weight"] = torch.ones(info["num_chs"])
            state[f"norm{place}.bias"] = torch.zeros(info["num_chs"])
    return state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a torch file, by official name, on the CPU.

    Unwraps the usual containers (averaged weights are preferred), takes the backbone out of a
    detector or segmentor, and removes the prefixes that wrappers leave on names. Raises ModelError
    if the file is unreadable or holds no weights.
    """
    path = Path(path)
    try:
        content = _read(path)
    except Exception as error:  # whatever the reader meets, the user's file is at fault
        raise ModelError(f"cannot read weights from {path}: {error}") from error
    while container := next(
        (key for key in CONTAINERS if isinstance(content.get(key), dict)), None
    ):
        content = content[container]
    weights = {_bare(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ModelError(
            f"{path} holds no weights; it has {_shorten([str(key) for key in content])}"
        )
    trunk = {k.removeprefix(TRUNK): v for k, v in weights.items() if k.startswith(TRUNK)}
    return trunk or weights


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        # Imported here alone: bundles that vendor this package need torch and nothing else.
        from safetensors.torch import load_file

        return dict(load_file(path))
    # Official training scripts save their command line beside the weights: plain values in a bag.
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
    return content


def _fit(model: Backbone, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that the model takes, and what is wrong with them."""
    expected, weights, head = dict(_named(model).state_dict()), dict(weights), _head(model)
    if model.num_classes == 0 and not any(name.startswith(head) for name in weights):
        expected = {name: value for name, value in expected.items() if not name.startswith(head)}
        if isinstance(model, TransXNet):
            weights = {k: v for k, v in weights.items() if not OUTPUT_NORM.fullmatch(k)}
    listed = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    return weights, [f"{label}: {_shorten(names)}" for label, names in listed.items() if names]


def _advice(weights: Mapping[str, Tensor]) -> str:
    """Which of MODELS the weights fit, as the call that builds it."""
    found = identify(weights)
    if found is None:
        return "Build the model that wrote it, with the same number of classes"
    name, options = found
    called = ", ".join([repr(name), *(f"{key}={value}" for key, value in options.items())])
    return f"It is a file of {name}: build({called}) takes it"


def identify(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """The one of MODELS that the weights by official name fit, and the options to build it with.

    The options are num_classes, 0 for weights without a head, and pretrain_size where the
    position tables tell it.
    """
    head = _first(weights, "head.bias", "classifier.2.bias")
    stem = _first(weights, "patch_embed1.proj.weight", "patch_embed.proj.conv.weight")
    options: dict[str, Any] = {"num_classes": 0 if head is None else head.numel()}
    for name, config in MODELS.items():
        if stem is None or stem.shape[:1] != config.widths[:1]:
            continue  # cheaper than building it
        if (table := weights.get("relative_pos_enc.0")) is not None and table.dim() == 4:
            options["pretrain_size"] = max(1, round(table.shape[2] ** 0.5) * config.stem_stride)
        try:
            with torch.device("meta"):
                _, problems = _fit(build(name, img_size=64, **options), weights)
        except ModelError:  # an option that the family does not have: not its file
            continue
        if not problems:
            return name, options
    return None


def _first(weights: Mapping[str, Tensor], *names: str) -> Tensor | None:
    return next((weights[name] for name in names if name in weights), None)


def _named(model: Backbone) -> nn.Module:
    """The module whose state dict carries the published names."""
    net: nn.Module = model.net if isinstance(model, TimmModel) else model
    return net


def _head(model: Backbone) -> str:
    """What the names of the head's parameters start with."""
    return f"{model.blocks()[-1].name}."


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _shorten(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
