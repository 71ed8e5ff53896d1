"""Which model a bundle holds, and how it is built; its source goes into bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import Backbone


@dataclass(frozen=True)
class OwnModel:
    """A network by its class, that class's settings, and what is done to it at last."""

    family: type[Backbone]
    settings: dict[str, Any]
    finish: Callable[[Backbone], Backbone]

    def build(self, family: type[Backbone] | None = None, **changes: Any) -> Backbone:
        """Build the network without its weights, as a subclass of its family if one is given.

        `changes` are settings that shall differ: img_size (height, width), num_classes (0 leaves
        the head out), drop_path.
        """
        settings = self.settings | changes
        num_classes = settings.pop("num_classes")
        model = (family or self.family)(**settings, num_classes=max(num_classes, 1))
        if num_classes == 0:
            model.reset_classifier(0)
        return self.finish(model)

    def load(self, folder: str | Path) -> Backbone:
        """Return the trained network of the bundle in `folder`, for evaluation, on the CPU.

        Its `forward` gives logits, its `forward_features` the four maps; `reset_buffers` fits it
        to another size of images.
        """
        from safetensors.torch import load_file

        model = self.build()
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval()
