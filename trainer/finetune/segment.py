"""Semantic segmentation: the settings, the published recipes, the task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import UserError
from trainer.pretrained import Pretrained

from .draw_masks import draw_masks
from .heads.mask2former import Mask2Former, Mask2FormerSize
from .heads.semantic import SemanticHead
from .heads.semantic_fpn import SemanticFPN
from .heads.upernet import UPerNet
from .miou import ConfusionMatrix
from .semantic_augment import Augmentation
from .semantic_data import SemanticFolder, SemanticViews, ade20k, index_folder
from .semantic_inference import MULTI_SCALE, Inference, predict
from .settings import DenseSettings, ModelSettings, OptimSettings, TrainSettings
from .trunk import Trunk, make_trunk

Head = Literal["upernet", "mask2former", "semantic_fpn"]
HEADS: tuple[Head, ...] = ("upernet", "mask2former", "semantic_fpn")


@dataclass(frozen=True, kw_only=True)
class SegmentData:
    """Pictures whose pixels have classes, and the sizes at which they are seen."""

    root: str | None = "datasets/ADEChallengeData2016"
    """ADE20K's folder; unset takes the four folders below."""
    train: str | None = None
    """Folder of the training images."""
    train_labels: str | None = None
    """Folder of their labels: PNG files of the same names that hold a class for each pixel."""
    val: str | None = None
    """Folder of the validation images."""
    val_labels: str | None = None
    """Folder of their labels."""
    classes: str | None = None
    """Names of the classes from 0 on: a JSON list, or text with one in each line."""
    longest: int = 2048
    """Longer side that pictures are fitted to."""
    shortest: int = 512
    """Shorter side that pictures are fitted to."""
    ratios: tuple[float, float] = (0.5, 2.0)
    """Range of the factor on that size in training."""
    crop: int = 512
    """Side of the square training crops."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How validation pictures are looked at."""

    window: int | None = None
    """Side of sliding windows; unset looks at whole pictures."""
    stride: int = 341
    """Pixels between windows."""
    multi_scale: bool = False
    """Average over sizes from 0.5 to 1.75 times, each mirrored too."""


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(DenseSettings):
    """All of a segmentation run."""

    head: Head
    """The decoder."""
    data: SegmentData = field(default_factory=SegmentData)
    eval: EvalSettings = field(default_factory=EvalSettings)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        data = self.data
        named = (data.train, data.train_labels, data.val, data.val_labels, data.classes)
        if (data.root is None) != all(named) or (data.root is not None and any(named)):
            yield (
                "give data.root in ADE20K's form, or --data.root None with all of data.train, "
                "data.train_labels, data.val, data.val_labels and data.classes"
            )
        if data.crop < 32 or not 0 < data.ratios[0] <= data.ratios[1]:
            yield (
                f"data.crop {data.crop} must be at least 32 and data.ratios {data.ratios} rise "
                "from above 0"
            )


# Drop path of the sizes tiny (T), small (S) and base (B), as published for each head.
_DROP_PATH = {
    "upernet": {"tiny": 0.4, "small": 0.6, "base": 0.7},
    "mask2former": {"tiny": 0.3, "small": 0.5, "base": 0.6},
    "semantic_fpn": {"t": 0.1, "s": 0.2, "b": 0.3},
}


def recipe(head: Head, source: Pretrained, *, out: str) -> SegmentSettings:
    """Return the published settings of a head on a backbone, for ADE20K.

    UPerNet and Mask2Former are TransNeXt's, Semantic FPN is TransXNet's; the other family gets the
    same. Sizes that were not published keep the drop path of their classification recipe.
    """
    size = source.config.name.partition("_")[2]
    optim, train, window = {
        "upernet": (
            OptimSettings(lr=6e-5, schedule="poly", power=1.0, warmup_steps=1500),
            TrainSettings(steps=160_000, batch_size=16),
            512,
        ),
        "mask2former": (
            OptimSettings(
                lr=1e-4, backbone_lr=0.1, schedule="poly", power=0.9, warmup_steps=0, clip_grad=0.01
            ),
            TrainSettings(steps=160_000, batch_size=16),
            None,
        ),
        "semantic_fpn": (
            OptimSettings(lr=2e-4, weight_decay=1e-4, schedule="cosine", warmup_steps=1000),
            TrainSettings(steps=80_000, batch_size=32),
            None,
        ),
    }[head]
    return SegmentSettings(
        head=head,
        backbone=source.source,
        out=out,
        model=ModelSettings(
            img_size=512, drop_path=_DROP_PATH[head].get(size, source.published_drop_path)
        ),
        optim=optim,
        train=train,
        eval=EvalSettings(window=window),
    )


class Segmentation:
    """A segmentation head with its training and validation pictures."""

    def __init__(self, settings: SegmentSettings, source: Pretrained) -> None:
        data, look = settings.data, settings.eval
        self.settings = settings
        train, self.val = _folders(data)
        self.classes = train.classes
        for folder in (train, self.val):
            folder.check()
        self.name = f"{settings.head} on {source.config.name}, {len(self.classes)} classes"
        torch.manual_seed(settings.train.seed)
        trunk = make_trunk(source, settings.model)
        self.model: nn.Module = _head(settings, trunk, source, num_classes=len(self.classes))
        red, green, blue = (round(255 * value) for value in source.mean)
        self.samples = SemanticViews(
            train,
            Augmentation(
                box=(data.longest, data.shortest),
                ratios=data.ratios,
                crop=data.crop,
                fill=(red, green, blue),
            ),
        )
        self.how = Inference(
            box=(data.longest, data.shortest),
            scales=MULTI_SCALE if look.multi_scale else (1.0,),
            flip=look.multi_scale,
            window=look.window,
            stride=look.stride,
        )

    def collate(self, views: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a micro-batch, stacked."""
        images, labels = zip(*views, strict=True)
        return torch.stack(images), torch.stack(labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return mean IoU and accuracies in percent, on all ranks."""
        counts = ConfusionMatrix(len(self.classes), device=_device(model))
        for index in range(dist.get_rank(), len(self.val.pictures), dist.get_world_size()):
            _, labels = self.val.read(index)
            counts.update(self._predict(model, index), labels.long().to(_device(model)))
        scores = counts.scores()
        return {
            "miou": 100 * scores.miou,
            "macc": 100 * scores.macc,
            "aacc": 100 * scores.aacc,
        }

    def draw(self, model: nn.Module) -> list[Tensor]:
        """Return the first validation pictures under truth and prediction."""
        shown = range(min(self.settings.train.pictures, len(self.val.pictures)))
        return [
            torch.from_numpy(
                draw_masks(*self.val.read(index), self._predict(model, index), self.classes)
            )
            for index in shown
        ]

    def _predict(self, model: nn.Module, index: int) -> Tensor:
        """Return the classes int64 [H, W] of validation picture `index`."""
        assert isinstance(model, SemanticHead), "a segmentation head predicts"
        image, _ = self.val.read(index)
        return predict(model, image.to(_device(model)), self.how).argmax(dim=0)


def _folders(data: SegmentData) -> tuple[SemanticFolder, SemanticFolder]:
    if data.root is not None:
        root = Path(data.root)
        return ade20k(root, "training"), ade20k(root, "validation")
    train, train_labels, val, val_labels, classes = (
        Path(str(path))
        for path in (data.train, data.train_labels, data.val, data.val_labels, data.classes)
    )
    return index_folder(train, train_labels, classes), index_folder(val, val_labels, classes)


def _head(
    settings: SegmentSettings, trunk: Trunk, source: Pretrained, *, num_classes: int
) -> SemanticHead:
    """Return the head of the settings, as published or small.

    Raises:
        UserError: if there is no such head.
    """
    small = settings.model.head_size == "small"
    if settings.head == "upernet":
        widths = (64, 64) if small else (512, 256)
        return UPerNet(
            trunk, num_classes=num_classes, mean=source.mean, std=source.std,
            channels=widths[0], auxiliary_channels=widths[1],
        )  # fmt: skip
    if settings.head == "mask2former":
        size = Mask2FormerSize(
            num_queries=25, width=64, pixel_layers=2, pixel_feedforward=128, query_layers=3,
            query_feedforward=128, num_points=1024,
        ) if small else Mask2FormerSize()  # fmt: skip
        return Mask2Former(
            trunk, num_classes=num_classes, mean=source.mean, std=source.std, size=size
        )
    if settings.head == "semantic_fpn":
        widths = (64, 32) if small else (256, 128)
        return SemanticFPN(
            trunk, num_classes=num_classes, mean=source.mean, std=source.std,
            pyramid=widths[0], channels=widths[1],
        )  # fmt: skip
    raise UserError(f"unknown head {settings.head} (known: {', '.join(HEADS)})")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
