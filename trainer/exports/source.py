"""What is exported, and what is known of it: its recipe, its data, its accuracy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.base import ModelError
from models.fold import fold_batch_norm

from .. import manifest
from ..config import UserError
from ..pretrained import Pretrained, pretrained, run_config


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a run knows of a checkpoint."""

    recipe: str
    step: int
    data: str
    """The hash of the index of the training images: their fingerprint."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """What the run measured of these weights at this step: `top1` and `top5` in percent."""


def load(
    source: Path,
    *,
    weights: str | None = None,
    name: str | None = None,
    img_size: int | None = None,
) -> Pretrained:
    """Read a run, a checkpoint, a file of the authors' or another export on one process.

    `weights` is ema or live, of a run; `name` what a file of the authors' has to be. With
    `img_size` the model is set for images of that side instead of those it was trained on.

    Raises:
        UserError: if there is nothing of the kind, or it is damaged or another model.
        ModelError: if the weights do not fit the model, or the model not the images.
    """
    found = pretrained(source, weights=weights)
    if not found.trained:
        raise UserError(f"{source} has learnt nothing: give a run, a checkpoint or a weight file")
    if name not in (None, found.config.name):
        raise UserError(f"{source} holds weights of {found.config.name}, not of --model {name}")
    if img_size in (None, found.config.img_size):
        return found
    assert img_size is not None
    model = found.backbone(img_size=img_size, num_classes=found.model.num_classes).eval()
    # Positions are a matter of the size that they were learned at.
    learned_at = found.config.img_size if found.config.name.startswith("transnext") else None
    pretrain_size = found.config.pretrain_size or learned_at
    config = replace(found.config, img_size=img_size, pretrain_size=pretrain_size)
    return replace(found, model=model, config=config)


def without_head(source: Pretrained) -> Pretrained:
    """Return the trunk alone, for detectors and segmentors.

    Raises:
        ModelError: if the model has no four stages.
    """
    if len(source.model.feature_info) != 4:
        raise ModelError(f"{source.config.name} has no dense form: export it by another --format")
    source.model.reset_classifier(0)
    return replace(source, config=replace(source.config, num_classes=0))


def fold(source: Pretrained) -> Pretrained:
    """Return the model without the batch norms that evaluation can do without.

    Raises:
        UserError: if it has none that can be folded.
    """
    folded = fold_batch_norm(source.model)
    if folded.state_dict().keys() == source.model.state_dict().keys():
        name = source.config.name
        raise UserError(f"{name} has no batch norm to fold: leave --fold-batch-norm out")
    return replace(source, model=folded, folded=True)


def provenance(source: Pretrained) -> Provenance | None:
    """Return what the run knows of a checkpoint's weights; None for weights from elsewhere."""
    if source.checkpoint is None:
        return None
    state = manifest.read(source.checkpoint).record["state"]
    prefix = "ema_" if source.weights == "ema" else ""
    metrics = source.checkpoint.parent.parent / "metrics.jsonl"
    return Provenance(
        recipe=run_config(source.checkpoint).recipe,
        step=state["step"],
        data=state["cursor"]["index"],
        accuracy=_measured(metrics, state["step"], prefix),
    )


def _measured(metrics: Path, step: int, prefix: str) -> dict[str, float]:
    """Return the last evaluation of a step in a run's metrics.jsonl, empty where there is none."""
    found: dict[str, float] = {}
    for line in metrics.read_text(errors="replace").splitlines() if metrics.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        if event["kind"] == "eval" and event["step"] == step:
            found = {name: event.get(f"{prefix}{name}") for name in ("top1", "top5")}
    return {name: value for name, value in found.items() if value is not None}
