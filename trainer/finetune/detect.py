"""Detection and instance segmentation: the settings, the published recipes, the task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import UserError
from trainer.group import gather
from trainer.pretrained import Pretrained

from .coco_data import CocoSplit, Target
from .coco_metrics import average_precision, detections
from .detection_views import DetectionViews
from .draw_boxes import side_by_side
from .heads.pyramid_detectors import SIZES, OneStage, TwoStage
from .loop import to_device
from .settings import DenseSettings, ModelSettings, OptimSettings, TrainSettings
from .trunk import make_trunk

Head = Literal["mask_rcnn", "retinanet"]
HEADS: dict[str, type[TwoStage | OneStage]] = {"mask_rcnn": TwoStage, "retinanet": OneStage}


@dataclass(frozen=True, kw_only=True)
class DetectionData:
    """Splits in COCO's format, and the sizes at which their pictures are seen."""

    train: str = "datasets/coco/train2017"
    """Folder of the training images; its labels are ../annotations/instances_NAME.json."""
    val: str = "datasets/coco/val2017"
    """Folder of the validation images, likewise."""
    scales: tuple[int, ...] = (800,)
    """Shorter sides in training, one drawn for each picture; the largest counts in evaluation."""
    longest: int = 1333
    """Longer side at most."""
    crop: bool = False
    """Crop half of the training pictures at random before they are resized, as DETR does."""


@dataclass(frozen=True, kw_only=True)
class DetectSettings(DenseSettings):
    """All of a detection run."""

    head: Head
    """The detector."""
    data: DetectionData = field(default_factory=DetectionData)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if not self.data.scales or min(self.data.scales) < 32:
            yield f"data.scales is {self.data.scales}: give sides of at least 32 pixels"
        elif self.data.longest < max(self.data.scales):
            yield (
                f"data.longest {self.data.longest} is below the largest of data.scales "
                f"{self.data.scales}: raise it"
            )


# Drop path of the sizes tiny (T), small (S) and base (B), as published for each head.
_TRANSNEXT_DROP_PATH = {"tiny": 0.4, "small": 0.6, "base": 0.7}
_TRANSXNET_DROP_PATH = {"t": 0.1, "s": 0.2, "b": 0.3}


def recipe(head: Head, source: Pretrained, *, out: str) -> DetectSettings:
    """Return the published settings of a head on a backbone: 12 epochs of COCO ("1×").

    Both papers train Mask R-CNN so, TransXNet's RetinaNet too. Sizes that were not published keep
    the drop path of their classification recipe.
    """
    family, _, size = source.config.name.partition("_")
    rates = _TRANSXNET_DROP_PATH if family == "transxnet" else _TRANSNEXT_DROP_PATH
    return DetectSettings(
        head=head,
        backbone=source.source,
        out=out,
        model=ModelSettings(drop_path=rates.get(size, source.published_drop_path)),
        optim=OptimSettings(weight_decay=1e-4 if head == "retinanet" else 0.05),
        train=TrainSettings(epochs=12, batch_size=16),
    )


class Detection:
    """A detector with its training and validation pictures."""

    def __init__(self, settings: DetectSettings, source: Pretrained) -> None:
        data = settings.data
        self.settings = settings
        train, self.val = CocoSplit(data.train), CocoSplit(data.val)
        if train.classes != self.val.classes:
            raise UserError(
                f"{train.labels} and {self.val.labels} have other categories: use splits of one set"
            )
        self.classes = train.classes
        head = HEADS[settings.head]
        self.name = f"{settings.head} on {source.config.name}, {len(self.classes)} classes"
        torch.manual_seed(settings.train.seed)
        self.model: nn.Module = head(
            make_trunk(source, settings.model),
            num_classes=len(self.classes),
            mean=source.mean,
            std=source.std,
            side=max(data.scales),
            longest=data.longest,
            size=SIZES[settings.model.head_size],
        )
        self.has_masks = head.has_masks
        self.samples = DetectionViews(
            train,
            scales=data.scales,
            longest=data.longest,
            crop=data.crop,
            masks=self.has_masks,
        )

    def collate(self, views: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
        """Return the images and the targets of a micro-batch, each as it is."""
        return [image for image, _ in views], [target for _, target in views]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the average precision of boxes (and masks) in percent, on all ranks."""
        mine: list[dict[str, Any]] = []
        for index in range(dist.get_rank(), len(self.val), dist.get_world_size()):
            mine += detections(self.val, index, self._detect(model, index))
        everyone = [result for results in gather(mine) for result in results]
        scores = {}
        if dist.get_rank() == 0:
            scores = average_precision(self.val, everyone, masks=self.has_masks)
        first: dict[str, float] = gather(scores)[0]
        return first

    def draw(self, model: nn.Module) -> list[Tensor]:
        """Return the first validation pictures with truth and detections side by side."""
        return [
            side_by_side(
                self.val.image(index).as_subclass(Tensor),
                self.val.target(index, masks=self.has_masks),
                to_device(self._detect(model, index), torch.device("cpu")),
                classes=self.classes,
            )
            for index in range(min(self.settings.train.pictures, len(self.val)))
        ]

    @torch.no_grad()
    def _detect(self, model: nn.Module, index: int) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        image = self.val.image(index).as_subclass(Tensor).to(device) / 255
        found: dict[str, Tensor] = model([image])[0]
        return found
