"""Detection and instance segmentation: the settings, the published recipes, the task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.transforms import v2

from trainer.config import UserError
from trainer.group import gather
from trainer.pretrained import Pretrained

from .coco_data import CocoSplit, Target
from .coco_metrics import average_precision, detections
from .detection_views import DetectionViews
from .draw_boxes import side_by_side
from .heads.dino.config import DinoConfig
from .heads.dino.model import Dino
from .heads.pyramid_detectors import SIZES, OneStage, TwoStage
from .loop import to_device
from .settings import DenseSettings, ModelSettings, OptimSettings, TrainSettings
from .trunk import make_trunk

Head = Literal["mask_rcnn", "retinanet", "dino"]
HEADS: tuple[Head, ...] = ("mask_rcnn", "retinanet", "dino")
_DETR_SCALES = tuple(range(480, 801, 32))
DINO_SIZES = {
    "published": DinoConfig(),
    "small": DinoConfig(
        width=64, hidden=128, heads=4, encoder_layers=2, decoder_layers=3, queries=60, denoising=20
    ),
}


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
    num_scales: Literal[4, 5] = 4
    """Maps that DINO looks at: of stages 2 to 4, or all, and a smaller one."""
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
_TRANSNEXT_DINO_DROP_PATH = {"tiny": 0.3, "small": 0.5, "base": 0.6}
_TRANSXNET_DROP_PATH = {"t": 0.1, "s": 0.2, "b": 0.3}


def recipe(head: Head, source: Pretrained, *, out: str) -> DetectSettings:
    """Return the published settings of a head on a backbone: 12 epochs of COCO ("1×").

    Mask R-CNN is both papers', RetinaNet TransXNet's, DINO TransNeXt's; the other family gets the
    same. Sizes that were not published keep the drop path of their classification recipe.
    """
    family, _, size = source.config.name.partition("_")
    rates = _TRANSNEXT_DINO_DROP_PATH if head == "dino" else _TRANSNEXT_DROP_PATH
    rates = _TRANSXNET_DROP_PATH if family == "transxnet" else rates
    data, optim = DetectionData(), OptimSettings()
    if head == "retinanet":
        optim = OptimSettings(weight_decay=1e-4)
    if head == "dino":
        data = DetectionData(scales=_DETR_SCALES, crop=True)
        optim = OptimSettings(backbone_lr=0.1, milestones=(11 / 12,), warmup_steps=0, clip_grad=0.1)
    return DetectSettings(
        head=head,
        backbone=source.source,
        out=out,
        model=ModelSettings(drop_path=rates.get(size, source.published_drop_path)),
        optim=optim,
        train=TrainSettings(epochs=12, batch_size=16),
        data=data,
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
        self.has_masks = settings.head == "mask_rcnn"
        self.name = f"{settings.head} on {source.config.name}, {len(self.classes)} classes"
        torch.manual_seed(settings.train.seed)
        self.model = _detector(settings, source, num_classes=len(self.classes))
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


def _detector(settings: DetectSettings, source: Pretrained, *, num_classes: int) -> nn.Module:
    """Return the head of the settings on its trunk, as published or small."""
    trunk, size, data = make_trunk(source, settings.model), settings.model.head_size, settings.data
    if settings.head == "dino":
        dino = Dino(
            trunk, num_classes=num_classes, num_scales=settings.num_scales, mean=source.mean,
            std=source.std, config=DINO_SIZES[size],
        )  # fmt: skip
        return AtOneSize(dino, side=max(data.scales), longest=data.longest)
    return (TwoStage if settings.head == "mask_rcnn" else OneStage)(
        trunk, num_classes=num_classes, mean=source.mean, std=source.std, side=max(data.scales),
        longest=data.longest, size=SIZES[size],
    )  # fmt: skip


class AtOneSize(nn.Module):
    """A detector whose pictures are resized in evaluation, as torchvision's do by themselves."""

    def __init__(self, detector: nn.Module, *, side: int, longest: int) -> None:
        super().__init__()
        self.detector = detector
        self.side, self.longest = side, longest

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Return losses of images as they are, or detections in their own pixels."""
        if targets is not None:
            return self.detector(images, targets)
        seen = [v2.functional.resize(i, [self.side], max_size=self.longest) for i in images]
        found = self.detector(seen)
        for one, image, small in zip(found, images, seen, strict=True):
            height, width = (a / b for a, b in zip(image.shape[1:], small.shape[1:], strict=True))
            one["boxes"] = one["boxes"] * one["boxes"].new_tensor((width, height, width, height))
        return found
