"""Compare this folder's program, loaded by torch alone, with the sample, at several batch sizes."""

from __future__ import annotations

import torch

from trainer.exports.check import HERE, agree, batches, cases, without_foveate


def main() -> None:
    """End in what is wrong."""
    without_foveate()
    program = torch.export.load(HERE / "model.pt2").module()
    samples = cases(lambda data, shape: torch.frombuffer(data, dtype=torch.float32).view(shape))
    names = [name for name in ("logits", "map1", "map2", "map3", "map4") if name in samples[0]]
    with torch.no_grad():
        for sample in batches(samples[0]):
            found = dict(zip(names, program(sample["images"]), strict=True))
            agree(f"torch {torch.__version__}", found, sample)


if __name__ == "__main__":
    main()
