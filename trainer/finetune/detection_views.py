"""How a detector sees its training pictures: resized to one of several scales, flipped, cropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from .coco_data import CocoSplit, Target


class DetectionViews:
    """The training samples of a split: an image float32 [3, H, W] in 0..1, and its target.

    The shorter side becomes one of `scales`, the longer at most `longest`. With `crop`, half of
    the pictures are first resized to one of 400, 500 and 600 pixels, scaled as `scales` are to 800,
    and cropped at random (DETR, https://arxiv.org/abs/2005.12872). Pictures without objects are
    left out. What is drawn comes from torch's generator.
    """

    def __init__(
        self, split: CocoSplit, *, scales: tuple[int, ...], longest: int, crop: bool, masks: bool
    ) -> None:
        self.split = split
        self.masks = masks
        self.kept = [i for i in range(len(split)) if len(split.target(i, masks=False)["labels"])]
        resize = v2.RandomChoice([v2.Resize(side, max_size=longest) for side in scales])
        unit = max(scales) / 800
        views: Any = resize
        if crop:
            before = [v2.Resize(round(side * unit)) for side in (400, 500, 600)]
            cropped = v2.Compose([v2.RandomChoice(before), RandomSizeCrop(384 * unit, 600 * unit)])
            views = v2.Compose([v2.RandomChoice([v2.Identity(), cropped]), resize])
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(), views, v2.SanitizeBoundingBoxes(labels_getter=_labels)]
        )

    def __len__(self) -> int:
        return len(self.kept)

    def view(self, index: int) -> tuple[Tensor, Target]:
        """Return sample `index` as torch's generator has it seen; see the class."""
        number = self.kept[index]
        image = self.split.image(number)
        seen, target = self.transform(image, self.split.target(number, masks=self.masks))
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return v2.functional.to_dtype(seen.as_subclass(Tensor), torch.float32, scale=True), plain


class RandomSizeCrop(v2.Transform):  # type: ignore[misc]
    """A crop whose sides are each drawn between `least` and `most` pixels, as far as there are."""

    def __init__(self, least: float, most: float) -> None:
        super().__init__()
        self.least, self.most = round(least), round(most)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw the crop of an image and all that belongs to it."""
        height, width = v2.functional.get_size(flat_inputs[0])
        rows, columns = (self._side(limit) for limit in (height, width))
        return {
            "top": _below(height - rows + 1),
            "left": _below(width - columns + 1),
            "height": rows,
            "width": columns,
        }

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Crop an image, boxes or masks."""
        return self._call_kernel(v2.functional.crop, inpt, **params)

    def _side(self, limit: int) -> int:
        least, most = min(self.least, limit), min(self.most, limit)
        return least + _below(most - least + 1)


def _below(limit: int) -> int:
    return int(torch.randint(limit, ()))


def _labels(inputs: Any) -> list[Tensor]:
    """What goes with boxes that a crop has left too little of: labels and masks."""
    target = inputs[1]
    return [target[name] for name in ("labels", "masks") if name in target]
