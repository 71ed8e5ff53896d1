"""Official checkpoint files into state dicts; `state_dict()` itself carries the official names.

Invariant: files are never unpickled, and a model is filled completely or not at all.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Backbone, ModelError

# Where training scripts put the weights, the averaged ones (which are evaluated) first.
CONTAINERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")


def load_weights(model: Backbone, path: str | Path) -> None:
    """Fill `model` from a checkpoint file; see `read_weights`.

    Raises ModelError that lists the missing, unknown and misshapen entries if it does not fit.
    """
    weights, expected = read_weights(path), model.state_dict()
    problems = [
        f"{label}: {_shorten(names)}"
        for label, names in (
            ("missing", [name for name in expected if name not in weights]),
            ("unknown", [name for name in weights if name not in expected]),
            (
                "of another shape",
                [
                    f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
                    for name, value in expected.items()
                    if name in weights and weights[name].shape != value.shape
                ],
            ),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Build the model that wrote it, with the same number of classes"
        )
    model.load_state_dict(weights, strict=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a torch file, by official name, on the CPU.

    Unwraps the usual containers (averaged weights are preferred) and the prefixes that wrappers
    leave on names. Raises ModelError if the file is unreadable or holds no weights.
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
    return weights


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        # Imported here alone: bundles that vendor this package need torch and nothing else.
        from safetensors.torch import load_file

        return dict(load_file(path))
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
    return content


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _shorten(names: list[str], limit: int = 8) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
