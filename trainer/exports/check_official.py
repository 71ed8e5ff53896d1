"""Compare the weights in this folder's file, in the model beside it, with the sample."""

from __future__ import annotations

import torch

from trainer.exports.check import HERE, agree, cases, without_foveate


def main() -> None:
    """End in what is wrong."""
    without_foveate()
    import foveate_model  # type: ignore[import-not-found]

    (weights,) = torch.load(HERE / "model.pth", weights_only=True).values()
    model = foveate_model.build_model().eval()
    # The dense layout has neither a head nor, for TransXNet, what the head sees; and it has norms
    # of the outputs that are not ours.
    model.load_state_dict(weights, strict=False)
    samples = cases(lambda data, shape: torch.frombuffer(data, dtype=torch.float32).view(shape))
    for sample in samples:
        model.reset_buffers(tuple(sample["images"].shape[2:]))
        with torch.no_grad():
            maps = model.forward_features(sample["images"])
            found = {f"map{place}": one for place, one in enumerate(maps, start=1)}
            if "logits" in sample:
                found["logits"] = model.classify(maps[-1])
        agree(f"torch {torch.__version__}", found, sample)


if __name__ == "__main__":
    main()
