"""Record this processor's golden loss curves: `python -m tests.goldens FILE` adds them to FILE.

Twelve steps of a pico of each family with every augmentation on, in deterministic mode. The CPU's
newer instructions are left aside, so that the curves hang on the machine as little as may be: those
of an AMD and an Intel processor still differ in the seventh digit.
"""

from __future__ import annotations

import os
import sys

os.environ |= {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

import json
import platform
import re
import tempfile
from pathlib import Path

import torch

from tests.dist import run_distributed
from tests.trainer.runs import losses, tiny_config, train_all

MODELS = ("transnext_pico", "transxnet_pico")
SETTINGS = (
    *("--backend.name", "ddp", "--train.deterministic", "--train.accumulate", "2"),
    *("--train.epochs", "3", "--eval.every-epochs", "3", "--optim.warmup-epochs", "1"),
    *("--data.train", "num_samples=96,num_classes=10,size=20"),
)


Curves = dict[str, list[float]]  # losses by model


def processor() -> str:
    """What the last bits of the losses hang on: torch's version and the processor's kind."""
    described = dict(
        re.findall(r"^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    )
    kind = (described.get(key, "?") for key in ("vendor_id", "cpu family", "model"))
    return " ".join(("torch", torch.__version__, platform.machine(), *kind))


def record() -> Curves:
    """Train both models and return their losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs = [
            tiny_config(folder / model, "--model.name", model, *SETTINGS).to_json()
            for model in MODELS
        ]
        run_distributed(train_all, 1, configs)
        return {model: list(losses(folder / model).values()) for model in MODELS}


def main(path: Path) -> None:
    """Add what is recorded here to the curves that a file holds, if it is there."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | {processor(): record()}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
