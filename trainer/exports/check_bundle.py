"""Compare this bundle's model, as each library that is here loads it, with the sample."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from typing import Any

from trainer.exports.check import HERE, agree, cases, without_foveate


def by_torch(samples: list[dict[str, Any]]) -> None:
    """Load it by its own file alone."""
    import foveate_model  # type: ignore[import-not-found]
    import torch

    model = foveate_model.load_model(HERE)
    for sample in samples:
        images = sample["images"]
        model.reset_buffers(tuple(images.shape[2:]))
        maps = model.forward_features(images)
        found = {f"map{place}": one for place, one in enumerate(maps, start=1)}
        if "logits" in sample:
            found["logits"] = model.classify(maps[-1])
        agree(f"torch {torch.__version__}", found, sample)


def by_timm(samples: list[dict[str, Any]]) -> None:
    """Load it by create_model, as a classifier and as a feature pyramid."""
    if (HERE / "foveate_timm.py").exists():  # timm's own networks need none
        import foveate_timm  # type: ignore[import-not-found]  # noqa: F401 (registers the model)
    import timm

    name = f"local-dir:{HERE}"
    for sample in samples:
        found = {}
        if "logits" in sample:
            found["logits"] = timm.create_model(name, pretrained=True).eval()(sample["images"])
        if "map1" in sample:
            pyramid = timm.create_model(name, pretrained=True, features_only=True).eval()
            for place, one in enumerate(pyramid(sample["images"]), start=1):
                found[f"map{place}"] = one
        agree(f"timm {timm.__version__}", found, sample)


def by_transformers(samples: list[dict[str, Any]]) -> None:
    """Load it by the Auto classes."""
    import transformers
    from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification

    own = {"trust_remote_code": True, "local_files_only": True}
    config = AutoConfig.from_pretrained(HERE, **own)
    backbone = type(AutoBackbone.from_config(config)).from_pretrained(HERE, config=config)
    for sample in samples:
        maps = backbone.eval()(sample["images"]).feature_maps
        found = {f"map{place}": one for place, one in enumerate(maps, start=1)}
        if "logits" in sample:
            classifier = AutoModelForImageClassification.from_pretrained(HERE, **own).eval()
            found["logits"] = classifier(sample["images"]).logits
        agree(f"transformers {transformers.__version__}", found, sample)


def main() -> None:
    """Ask every library that is installed or named as an argument; end in what is wrong."""
    without_foveate()
    import torch

    samples = cases(lambda data, shape: torch.frombuffer(data, dtype=torch.float32).view(shape))
    is_own = (HERE / "foveate_model.py").exists()  # otherwise it is a network of timm's
    with torch.no_grad(), tempfile.TemporaryDirectory() as modules:
        # transformers keeps copies of the code that it runs: none of this.
        os.environ |= {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        if is_own:
            by_torch(samples)
        if find_spec("timm") or "timm" in sys.argv or not is_own:
            by_timm(samples)
        if is_own and (find_spec("transformers") or "transformers" in sys.argv):
            by_transformers(samples)


if __name__ == "__main__":
    main()
