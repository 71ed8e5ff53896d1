"""The authors' own files, which their classifiers, detectors and segmentors read."""

from __future__ import annotations

from pathlib import Path

from models.convert import Layout, save_official

from ..pretrained import Pretrained
from .bundle import write_model_file


def write_official(source: Pretrained, out: Path, *, layout: Layout) -> None:
    """Write model.pth, and the model's code, by which verify.py reads it.

    Raises:
        ModelError: if the model has no such layout or the file cannot be written.
    """
    save_official(source.model, out / "model.pth", layout=layout)
    write_model_file(source, out)
