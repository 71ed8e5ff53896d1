"""Average precision as COCO defines it (https://cocodataset.org/#detection-eval)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor

from .coco_data import CocoSplit

NAMES = ("", "50", "75", "_small", "_medium", "_large")
"""What follows `box_ap` or `mask_ap` in the scores' names, in the order that they are computed."""


def detections(split: CocoSplit, index: int, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return a detector's answer about picture `index` in COCO's form for results.

    `found` is boxes [n, 4] (x1, y1, x2, y2 in pixels), scores [n], labels [n] from 0 and perhaps
    masks [n, 1, H, W] in 0..1.
    """
    boxes = found["boxes"].float().cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        {
            "image_id": split.pictures[index].id,
            "category_id": split.category_ids[label],
            "bbox": box,
            "score": score,
        }
        for box, score, label in zip(
            boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
        )
    ]
    if "masks" in found:
        for result, mask in zip(results, found["masks"], strict=True):
            result["segmentation"] = _encode(mask[0] >= 0.5)
    return results


def average_precision(
    split: CocoSplit, results: list[dict[str, Any]], *, masks: bool
) -> dict[str, float]:
    """Return the six average precisions of boxes, and of masks too, in percent.

    A size that no object of the split has counts 0.
    """
    scores: dict[str, float] = {}
    for kind, name in (("bbox", "box_ap"), ("segm", "mask_ap"))[: 1 + masks]:
        stats = _evaluate(split, results, kind) if results else np.zeros(6)
        for suffix, value in zip(NAMES, stats, strict=False):
            scores[f"{name}{suffix}"] = 100 * max(float(value), 0.0)
    return scores


def _evaluate(split: CocoSplit, results: list[dict[str, Any]], kind: str) -> Any:
    truth = COCO(json.loads(split.labels.read_text()))
    evaluation = COCOeval_faster(truth, truth.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def _encode(mask: Tensor) -> dict[str, Any]:
    encoded: dict[str, Any] = rle.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return encoded
