"""The table of an evaluation, and its two files: for programs and for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from ..pretrained import Pretrained
from .measure import Loading, Score
from .scores import SEVERITIES
from .sets import TestSet

JSON, MARKDOWN = "evaluation.json", "evaluation.md"
_MEASURES = {"top1": "top-1", "top5": "top-5", "mce": "mCE (lower is better)"}


def describe(source: Pretrained) -> str:
    """Say in a line which weights are evaluated."""
    what = f"{source.config.name}: {source.source}"
    if source.checkpoint is not None:
        what += f", {source.checkpoint.name}, {source.weights} weights"
    return what if source.trained else f"{what}, untrained"


def table(scores: Sequence[Score]) -> str:
    """Return the scores as a Markdown table with a column for each setting, in percent."""
    rows = []
    for name, group in groupby(scores, key=lambda score: score.data):
        several = list(group)
        for key, title in _MEASURES.items():
            values = [getattr(score, key) for score in several]
            if values[0] is not None:
                rows.append([name, f"{several[0].images}", title, *(f"{v:.2f}" for v in values)])
    settings = [str(setting) for setting in dict.fromkeys(score.setting for score in scores)]
    return _markdown(["data", "images", "%", *settings], rows, left=(0, 2))


def corruption_table(score: Score) -> str:
    """Return the errors on each corruption of ImageNet-C as a Markdown table, in percent."""
    assert score.corruptions is not None
    severities = [f"severity {severity}" for severity in SEVERITIES]
    return _markdown(
        ["corruption", *severities, "of AlexNet's"],
        [
            [kind, *(f"{error:.2f}" for error in found.errors), f"{found.relative:.2f}"]
            for kind, found in score.corruptions.items()
        ],
        left=(0,),
    )


def notes(scores: Sequence[Score], sets: Sequence[TestSet]) -> list[str]:
    """Say which sets are not complete: their scores are not comparable with published ones."""
    images = {score.data: score.images for score in scores}
    return [
        f"NOTE: {one.name} has {images[one.name]} of its {one.whole} images in {one.path}: the "
        "figures are not those of the published set"
        for one in sets
        if one.whole is not None and images[one.name] != one.whole
    ]


def write(
    folder: Path,
    source: Pretrained,
    sets: Sequence[TestSet],
    scores: Sequence[Score],
    loading: Loading,
) -> None:
    """Write the evaluation as JSON and as Markdown into a folder that exists."""
    content = _content(source, sets, scores, loading)
    (folder / JSON).write_text(json.dumps(content, indent=2) + "\n")
    corrupted = (
        f"Top-1 errors of {score.data} at {score.setting}:\n\n{corruption_table(score)}"
        for score in scores
        if score.corruptions is not None
    )
    parts = [describe(source), table(scores), *notes(scores, sets), *corrupted]
    (folder / MARKDOWN).write_text("\n\n".join(parts) + "\n")


def _content(
    source: Pretrained, sets: Sequence[TestSet], scores: Sequence[Score], loading: Loading
) -> dict[str, Any]:
    paths = {one.name: one.path for one in sets}
    return {
        "source": source.source,
        "checkpoint": None if source.checkpoint is None else str(source.checkpoint),
        "weights": source.weights,
        "trained": source.trained,
        "model": asdict(source.config),
        "crop_pct": source.crop_pct,
        "precision": loading.precision,
        "scores": [{**asdict(score), "path": paths[score.data]} for score in scores],
    }


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> str:
    """Return a Markdown table whose columns are aligned in plain text too."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    rule = [
        "-" * width if column in left else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    lines = [
        " | ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (heading, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)
