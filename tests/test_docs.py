"""What the documentation shows is what the code does."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from docs.draw_models import outputs
from models import build
from models.registry import MODELS
from trainer.sections import ModelConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "models.md").read_text()


def test_what_the_script_writes_is_committed():
    for path, text in outputs().items():
        assert path.read_text() == text, f"{path.name}: run python docs/draw_models.py"


def test_every_model_is_on_the_page():
    for name in MODELS:
        assert f"`{name}`" in PAGE


def test_links_lead_somewhere():
    for path in [DOCS.parent / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.slow
@torch.no_grad()
def test_examples_run(tmp_path, monkeypatch):
    """Every example as it stands; what follows `#` in it is the shape of the value before."""
    monkeypatch.chdir(tmp_path)
    weights = build("transnext_tiny").state_dict()
    torch.save({"model": weights}, "transnext_tiny_224_1k.pth")
    names = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(example, names)
        for value, shape in re.findall(r"^(\w+)\b.*# \[([\d, ]+)\]$", example, re.MULTILINE):
            assert list(names[value].shape) == [int(side) for side in shape.split(",")]
    torch.testing.assert_close(dict(names["model"].state_dict()), dict(weights))


def test_options_exist():
    settings = {field.name.replace("_", "-") for field in fields(ModelConfig)}
    assert set(re.findall(r"--model\.([a-z-]+)", PAGE)) <= settings
    with torch.device("meta"):
        for call in re.findall(r"`(build\([^`]*\))`", PAGE):
            if "NAME" not in call:
                eval(call, {"build": build})
