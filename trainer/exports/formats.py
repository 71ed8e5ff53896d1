"""The formats: what is written into a folder for each, and by what it is checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.convert import Layout

from ..config import UserError
from ..pretrained import Pretrained
from .bundle import write_bundle, write_configuration
from .card import card
from .folder import write_folder
from .graphs import write_onnx, write_program
from .official import write_official
from .sample import make_sample
from .source import without_head

FORMATS = ("timm", "transformers", "dense", "onnx", "torch", "official")
_CHECKS = {"onnx": "check_onnx", "torch": "check_torch", "official": "check_official"}


def export(source: Pretrained, out: Path, *, form: str, layout: Layout = "classification") -> None:
    """Write a model in the format `form` to the folder `out`, and verify it.

    Raises:
        UserError: if `out` is in the way or cannot be written, or what is in it does not verify.
        ModelError: if the model has no such form.
    """
    is_timms = source.config.name.startswith("timm:")
    if is_timms and form not in ("timm", "onnx", "torch"):
        raise UserError(f"{source.config.name} is timm's own: export it as timm, onnx or torch")
    if form == "dense" or (form, layout) == ("official", "dense"):
        source = without_head(source)
    writers: dict[str, Callable[[Pretrained, Path], None]] = {
        "onnx": write_onnx,
        "torch": write_program,
        "official": partial(write_official, layout=layout),
    }

    def write(folder: Path) -> None:
        writers.get(form, write_bundle)(source, folder)
        write_configuration(source, folder)
        (folder / "README.md").write_text(card(source, form=form))

    check = f"trainer.exports.{_CHECKS.get(form, 'check_bundle')}"
    write_folder(out, write, sample=make_sample(source), check=check, library=form)
