"""Compare this folder's graph in ONNX Runtime with the sample, at several batch sizes and sizes."""

from __future__ import annotations

import numpy as np
import onnxruntime  # type: ignore[import-untyped]

from trainer.exports.check import HERE, agree, batches, cases, without_foveate


def main() -> None:
    """End in what is wrong."""
    without_foveate()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: what it cannot compute in advance is none
    session = onnxruntime.InferenceSession(
        HERE / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    any_size = isinstance(session.get_inputs()[0].shape[2], str)
    for case in cases(lambda data, shape: np.frombuffer(data, np.float32).reshape(shape)):
        if any_size or case["images"].shape[2:] == tuple(session.get_inputs()[0].shape[2:]):
            for sample in batches(case):
                found = dict(
                    zip(names, session.run(None, {"images": sample["images"]}), strict=True)
                )
                agree(f"onnxruntime {onnxruntime.__version__}", found, sample)


if __name__ == "__main__":
    main()
