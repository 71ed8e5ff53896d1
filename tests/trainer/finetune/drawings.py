"""Drawn pictures with a class for each pixel, and small heads that learn them."""

import torch

from models.registry import build
from trainer.finetune.heads.mask2former import Mask2Former, Mask2FormerSize
from trainer.finetune.heads.semantic_fpn import SemanticFPN
from trainer.finetune.heads.upernet import UPerNet
from trainer.finetune.trunk import Trunk

CLASSES = ("ground", "disc", "square")
COLOURS = ((0.2, 0.5, 0.2), (0.9, 0.2, 0.1), (0.1, 0.3, 0.9))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = Mask2FormerSize(
    num_queries=8,
    width=32,
    pixel_layers=1,
    pixel_feedforward=32,
    query_layers=2,
    query_feedforward=32,
    num_points=256,
)
HEADS = {
    "upernet": (UPerNet, {"channels": 16, "auxiliary_channels": 8}),
    "mask2former": (Mask2Former, {"size": SMALL}),
    "semantic_fpn": (SemanticFPN, {"pyramid": 16, "channels": 8}),
}


def drawn(count, height=64, width=64, seed=0):
    """Images float32 [count, 3, H, W] and labels int64 [count, H, W]; the first row is ignored."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = torch.zeros(count, height, width, dtype=torch.long)
    for label in labels:
        (y, x), (top, left) = (
            (torch.rand(2, generator=generator) * 0.6 + 0.1) * torch.tensor([height, width])
            for _ in range(2)
        )
        side = min(height, width) / 4
        label[(rows - y) ** 2 + (columns - x) ** 2 < side**2] = 1
        label[(rows - top).abs().maximum((columns - left).abs()) < side / 1.5] = 2
    images = torch.tensor(COLOURS)[labels].permute(0, 3, 1, 2)
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    labels[:, 0] = 255
    return images.clamp(0, 1), labels


def small(head, trunk="transnext_pico", num_classes=3, seed=0, **options):
    """A head of HEADS on a pico trunk."""
    torch.manual_seed(seed)
    kind, sizes = HEADS[head]
    body = Trunk(build(trunk, img_size=64, drop_path=0.0))
    return kind(body, num_classes=num_classes, mean=MEAN, std=STD, **{**sizes, **options})


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())
