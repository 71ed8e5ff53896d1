"""A small DINO and pictures of coloured squares for it to find."""

import torch

from models.registry import build
from trainer.finetune.heads.dino.config import DinoConfig
from trainer.finetune.heads.dino.model import Dino
from trainer.finetune.trunk import Trunk

SMALL = DinoConfig(
    width=64,
    hidden=128,
    heads=4,
    encoder_layers=1,
    decoder_layers=2,
    queries=20,
    denoising=10,
)
COLOURS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def detector(trunk=None, *, config=SMALL, num_scales=4, num_classes=3, seed=0):
    """A small detector of fixed random weights."""
    torch.manual_seed(seed)
    trunk = Trunk(build("transnext_pico", img_size=64)) if trunk is None else trunk
    return Dino(trunk, num_classes=num_classes, num_scales=num_scales, config=config, **COLOURS)


def shaken(model, *, scale=0.05):
    """The model with some noise on all weights: heads that begin with zeros predict something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def picture(seed, size=48):
    """One to three squares, red, green or blue by their label, on grey."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    height, width = draw(size - 15, size + 1), draw(size - 15, size + 1)
    image = torch.full((3, height, width), 0.2)
    boxes, labels = [], []
    for _ in range(draw(1, 4)):
        side, label = draw(size // 5, size // 2), draw(0, 3)
        left, top = draw(0, width - side), draw(0, height - side)
        image[:, top : top + side, left : left + side] = torch.eye(3)[label][:, None, None]
        boxes.append([left, top, left + side, top + side])
        labels.append(label)
    return image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}
