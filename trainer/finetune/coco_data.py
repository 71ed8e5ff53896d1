"""Pictures with boxes and masks in COCO's format (https://cocodataset.org/#format-data).

A split is a folder of images, FOLDER/NAME, whose labels are FOLDER/annotations/instances_NAME.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask
from torchvision.tv_tensors import Image as TVImage

from trainer.config import UserError

Target = dict[str, Tensor]
"""`boxes` float32 [n, 4] (x1, y1, x2, y2 in pixels), `labels` int64 [n], from 0, and perhaps
`masks` uint8 [n, H, W]."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of a split: its file, its id in COCO's sense, its size, its labels."""

    id: int
    file: Path
    height: int
    width: int
    objects: tuple[dict[str, Any], ...]


class CocoSplit:
    """A split read and checked: `pictures`, `classes` (names) and `category_ids` (COCO's own).

    Raises UserError if files are missing or the labels are not what the format says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.labels = self.folder.parent / "annotations" / f"instances_{self.folder.name}.json"
        for path in (self.folder, self.labels):
            if not path.exists():
                raise UserError(
                    f"{path} does not exist: a split in COCO's format is a folder DIR/NAME of "
                    "images with its labels in DIR/annotations/instances_NAME.json"
                )
        try:
            content = json.loads(self.labels.read_text())
            categories = sorted(content["categories"], key=lambda entry: entry["id"])
            self.classes = tuple(str(entry["name"]) for entry in categories)
            self.category_ids = tuple(int(entry["id"]) for entry in categories)
            self.pictures = tuple(self._pictures(content))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.labels} is not in COCO's format: {error!r}") from None
        missing = [picture.file for picture in self.pictures if not picture.file.exists()]
        if missing:
            raise UserError(
                f"{missing[0]} and {len(missing) - 1} more images that {self.labels} lists are not "
                "there: restore them"
            )
        if not self.pictures:
            raise UserError(f"{self.labels} lists no images: give another folder")

    def _pictures(self, content: dict[str, Any]) -> Iterator[Picture]:
        objects: dict[int, list[dict[str, Any]]] = {}
        for entry in content["annotations"]:
            if entry["category_id"] not in self.category_ids:
                raise ValueError(f"annotation {entry.get('id')} has no category")
            objects.setdefault(entry["image_id"], []).append(entry)
        for image in content["images"]:
            yield Picture(
                id=image["id"],
                file=self.folder / image["file_name"],
                height=int(image["height"]),
                width=int(image["width"]),
                objects=tuple(objects.get(image["id"], ())),
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int) -> TVImage:
        """Return picture `index`, uint8 [3, H, W].

        Raises:
            UserError: naming the file, if it cannot be read or has another size than its labels.
        """
        picture = self.pictures[index]
        try:
            with Image.open(picture.file) as opened:
                pixels = np.array(opened.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise UserError(f"{picture.file} cannot be read ({error}): restore it") from None
        if pixels.shape[:2] != (picture.height, picture.width):
            raise UserError(
                f"{picture.file} is {pixels.shape[1]}x{pixels.shape[0]} pixels and {self.labels} "
                f"says {picture.width}x{picture.height}: restore one of them"
            )
        return TVImage(torch.from_numpy(pixels).permute(2, 0, 1))

    def target(self, index: int, *, masks: bool) -> Target:
        """Return the labels of picture `index`, crowds and empty boxes left out."""
        picture = self.pictures[index]
        size = (picture.height, picture.width)
        kept = [entry for entry in picture.objects if not entry.get("iscrowd") and _area(entry) > 0]
        boxes = torch.tensor([entry["bbox"] for entry in kept], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        numbers = [self.category_ids.index(entry["category_id"]) for entry in kept]
        target: Target = {
            "boxes": BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=size),
            "labels": torch.tensor(numbers, dtype=torch.int64),
        }
        if masks:
            drawn = [self._mask(entry["segmentation"], size) for entry in kept]
            stacked = np.stack(drawn) if drawn else np.zeros((0, *size), np.uint8)
            target["masks"] = Mask(torch.from_numpy(stacked))
        return target

    def _mask(self, segmentation: Any, size: tuple[int, int]) -> np.ndarray[Any, Any]:
        """Draw a mask [H, W] of polygons, or of runs, compressed or not."""
        if isinstance(segmentation, list):
            encoded = rle.merge(rle.frPyObjects(segmentation, *size))
        elif isinstance(segmentation["counts"], list):
            encoded = rle.frPyObjects(segmentation, *size)
        else:
            encoded = segmentation
        mask: np.ndarray[Any, Any] = rle.decode(encoded)
        return mask


def _area(entry: dict[str, Any]) -> float:
    _, _, width, height = entry["bbox"]
    return float(width) * float(height)
