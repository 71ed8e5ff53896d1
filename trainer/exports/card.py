"""Model cards: what is in an exported folder, how it came about, and how it is loaded."""

from __future__ import annotations

import json

from ..pretrained import Pretrained
from .source import Provenance, provenance

_TIMM = """\
```python
import sys, timm

sys.path.insert(0, DIR)  # this folder
import foveate_timm  # registers the architecture

model = timm.create_model(f"local-dir:{DIR}", pretrained=True)
maps = timm.create_model(f"local-dir:{DIR}", pretrained=True, features_only=True)
```"""
_TIMMS_OWN = """\
```python
import timm

model = timm.create_model(f"local-dir:{DIR}", pretrained=True)
```"""
_TRANSFORMERS = """\
```python
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor{classes}

processor = AutoImageProcessor.from_pretrained(DIR)
{classifier}config = AutoConfig.from_pretrained(DIR, trust_remote_code=True)
backbone = type(AutoBackbone.from_config(config)).from_pretrained(DIR, config=config)
```"""
_CLASSIFIER = """\
model = AutoModelForImageClassification.from_pretrained(DIR, trust_remote_code=True)
"""
_TORCH = """\
```python
import sys

sys.path.insert(0, DIR)
import foveate_model

model = foveate_model.load_model(DIR)  # needs torch and safetensors
maps = model.forward_features(images)  # after model.reset_buffers((height, width)), of any size
```"""
_ONNX = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
outputs = session.run(None, {"images": images})  # float32 [any number, 3, height, width]
```"""
_PROGRAM = """\
```python
import torch

program = torch.export.load("model.pt2").module()
outputs = program(images)  # float32 [any number, 3, height, width]
```"""
_OFFICIAL = "`model.pth` is for the authors' code, which reads it as one of its own."


def card(source: Pretrained, *, form: str) -> str:
    """Return the README.md of an export in the format `form`."""
    origin = provenance(source)
    library = form if form in ("timm", "transformers", "onnx") else "pytorch"
    facts = [f"license: apache-2.0\nlibrary_name: {library}\npipeline_tag: image-classification"]
    if origin is not None and "top1" in origin.accuracy:
        facts.append(_index(source, origin))
    front = "\n".join(facts)
    return f"""---
{front}
---

# {source.config.name}

{_history(source, origin)}

{_usage(source, form)}

Images are resized to a shorter side of {source.config.img_size} / {source.crop_pct:g} pixels,
bicubically, and cut to the centre of {source.config.img_size}; their colours, in 0..1, lose the
mean {list(source.mean)} and are divided by {list(source.std)}.

`python verify.py` compares the model with the outputs in `sample.safetensors`.
"""


def _index(source: Pretrained, origin: Provenance) -> str:
    """Return the measured accuracy in the form that model hubs read."""
    metrics = [
        {"type": "accuracy", "name": f"top-{name[3:]}", "value": round(value, 3)}
        for name, value in origin.accuracy.items()
    ]
    dataset = {"type": "custom", "name": f"the run's evaluation split (training: {origin.data})"}
    result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": metrics}
    index = [{"name": source.config.name, "results": [result]}]
    return f"model-index: {json.dumps(index)}"  # JSON is YAML


def _history(source: Pretrained, origin: Provenance | None) -> str:
    folded = " Batch norms are folded: for evaluation alone." if source.folded else ""
    if origin is None:
        return f"Weights from {source.source.rsplit('/', 1)[-1]}.{folded}"
    if origin.accuracy:
        measured = ", ".join(
            f"top-{name[3:]} {value:.2f} %" for name, value in origin.accuracy.items()
        )
    else:
        measured = "not measured at this step"
    return f"""Trained by Foveate.{folded}

| | |
|---|---|
| recipe | {origin.recipe} |
| step | {origin.step} |
| weights | {source.weights} |
| training images | index {origin.data} |
| accuracy on the evaluation split | {measured} |"""


def _usage(source: Pretrained, form: str) -> str:
    if form == "onnx":
        return _ONNX
    if form == "torch":
        return _PROGRAM
    if form == "official":
        return _OFFICIAL
    if source.config.name.startswith("timm:"):
        return _TIMMS_OWN
    has_head = source.config.num_classes > 0
    transformers = _TRANSFORMERS.format(
        classes=", AutoModelForImageClassification" if has_head else "",
        classifier=_CLASSIFIER if has_head else "",
    )
    return "\n\n".join((_TIMM, transformers, _TORCH))
