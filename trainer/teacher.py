"""A teacher for distillation: a trained network that is only asked, never trained.

Its weights come from safetensors files on disk: nothing is downloaded, unpickled or executed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.base import Backbone
from models.convert import load_weights
from models.registry import build

from .config import RunConfig, UserError
from .pretrained import pretrained

Colours = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Channel means and standard deviations."""


class Teacher:
    """A model in evaluation mode, with the `colours` that it was trained on.

    `given` are the colours of the images that it will be asked about.
    """

    def __init__(self, model: Backbone, *, colours: Colours, given: Colours) -> None:
        self.model = model.eval().requires_grad_(False)
        (mean, std), (its_mean, its_std) = (
            torch.tensor(c, device=model.device)[..., None, None] for c in (given, colours)
        )
        self._gain, self._shift = std / its_std, (mean - its_mean) / its_std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of normalised images float32 [B, 3, H, W].

        Raises:
            ModelError: if the model cannot take images of that size.
        """
        size = (images.shape[2], images.shape[3])
        if self.model.size != size:
            self.model.reset_buffers(size)
        logits: Tensor = self.model(torch.addcmul(self._shift, images, self._gain))
        return logits


def load_teacher(config: RunConfig, device: torch.device) -> Teacher:
    """Return the teacher that `config.distill` names, on `device`.

    Raises:
        UserError: if it cannot be found or read, or knows other classes than the model.
        ModelError: if its weights do not fit it, or it cannot take images of the run's sizes.
    """
    name = str(config.distill.teacher)
    given = (config.data.mean, config.data.std)
    weights = config.distill.weights
    model, colours = _trained(name) if weights is None else _by_name(name, weights, config)
    if model.num_classes != config.model.num_classes:
        raise UserError(
            f"distill.teacher {name} knows {model.num_classes} classes and model.num_classes is "
            f"{config.model.num_classes}: use a teacher trained on the same classes"
        )
    for side in {side for _, side in config.train.image_sides()} | {config.model.img_size}:
        if model.size != (side, side):
            model.reset_buffers((side, side))
    return Teacher(model.to(device), colours=colours or given, given=given)


def _by_name(name: str, weights: str, config: RunConfig) -> tuple[Backbone, Colours | None]:
    """Build a model of the registry; of timm's, the colours are known.

    Raises:
        UserError: if its weights are in another kind of file.
    """
    if not weights.endswith(".safetensors"):
        raise UserError(f"distill.weights is {weights}: give a .safetensors file")
    model = build(
        name, img_size=config.model.img_size, num_classes=config.model.num_classes, drop_path=0.0
    )
    load_weights(model, weights)
    cfg = getattr(getattr(model, "net", None), "pretrained_cfg", None)
    return model, _colours(cfg) if cfg else None


def _trained(name: str) -> tuple[Backbone, Colours]:
    """Return the network of a run, a bundle or a file of weights.

    Raises:
        UserError: if it is none of these, or a model's name alone.
    """
    try:
        found = pretrained(name)
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from None
    if not found.trained:
        raise UserError(
            f"distill.teacher {name} has learnt nothing: give a run, a bundle that foveate export "
            "wrote, or its --distill.weights FILE.safetensors"
        )
    return found.model, (found.mean, found.std)


def _colours(cfg: dict[str, Any]) -> Colours:
    (r, g, b), (r_std, g_std, b_std) = cfg["mean"], cfg["std"]
    return (r, g, b), (r_std, g_std, b_std)
