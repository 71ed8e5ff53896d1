"""The sample in an exported folder: inputs, and what the model makes of them here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.base import Backbone

from ..pretrained import Pretrained


class Outputs(nn.Module):
    """What a model gives, by `output_names`, of images [B, 3, H, W]: a graph's form."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model
        self.names = output_names(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits [B, num_classes] where there is a head, then the maps [B, C, H, W]."""
        maps = self.model.stages(images, None)
        logits = (self.model.classify(maps[-1]),) if "logits" in self.names else ()
        return (*logits, *maps) if "map1" in self.names else logits


def output_names(model: Backbone) -> tuple[str, ...]:
    """Name what a model gives; of timm's networks, which have no four maps, the logits alone."""
    maps = ("map1", "map2", "map3", "map4") if len(model.feature_info) == 4 else ()
    return (*(("logits",) if model.num_classes else ()), *maps)


def make_sample(source: Pretrained) -> dict[str, Tensor]:
    """Return two images and what the model gives; our networks also see one of another size.

    The latter's names begin with `other.`.
    """
    model = source.model
    height, width = model.size
    sample = _case(model, sample_images((height, width)))
    if "map1" in output_names(model):
        other = (height * 3 // 2, width * 5 // 4)
        model.reset_buffers(other)
        case = _case(model, sample_images(other)[:1])
        sample |= {f"other.{name}": tensor for name, tensor in case.items()}
        model.reset_buffers((height, width))
    return sample


@torch.no_grad()
def _case(model: Backbone, images: Tensor) -> dict[str, Tensor]:
    outputs = Outputs(model)
    found = dict(zip(outputs.names, outputs(images), strict=True))
    return {name: t.contiguous() for name, t in ({"images": images} | found).items()}


def sample_images(size: tuple[int, int]) -> Tensor:
    """Return two smooth images float32 [2, 3, *size] in -1..1, the same everywhere."""
    rows, columns = (torch.linspace(0, 2 * torch.pi, side) for side in size)
    first, second = [], []
    for channel in range(3):
        first.append(torch.sin((channel + 1) * rows[:, None] + channel * columns))
        second.append(torch.sin((3 - channel) * columns + (2 - channel) * rows[:, None]))
    return torch.stack((torch.stack(first), torch.stack(second)))
