"""Compare this bundle's model, loaded by timm alone, with the logits it was exported with."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Return 0 if the logits agree to 1e-5 of the largest, else 1."""
    # An installed Foveate must not help: importing it fails from here on.
    for package in ("launcher", "trainer", "models", "data"):
        sys.modules[package] = None  # type: ignore[assignment]
    sys.path.insert(0, str(HERE))

    if (HERE / "foveate_model.py").exists():  # timm's own networks need none
        import foveate_model  # type: ignore[import-not-found]  # noqa: F401 (registers the model)
    import timm
    import torch
    from safetensors.torch import load_file

    sample = load_file(HERE / "sample.safetensors")
    model = timm.create_model(f"local-dir:{HERE}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(sample["images"])
    difference = (logits - sample["logits"]).abs().max() / sample["logits"].abs().max()
    print(f"verified by timm {timm.__version__}: logits differ by {difference:.1e} of the largest")
    return int(not difference <= 1e-5)


if __name__ == "__main__":
    sys.exit(main())
