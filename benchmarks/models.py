"""Training cost of the models beside timm's Swin-T, in one process on one machine.

    python benchmarks/models.py [MODEL ...] [--compile]

Every round times one forward and backward pass of the rival and of each model in turn, so that
whatever else the machine does falls on all alike; only the ratio means anything. Memory is what
autograd keeps between the passes, counted by its saved-tensor hooks. One JSON line per model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

# This file's own folder would otherwise hide the package of the same name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch import Tensor, nn

from models import build
from models.registry import MODELS
from trainer.backends.wrap import wrap_blocks
from trainer.sections import MemoryConfig

RIVAL = "swin_tiny_patch4_window7_224"
DEFAULT = ("transnext_tiny", "transnext_micro", "transxnet_t")


@contextmanager
def count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Fill a table storage -> bytes with what autograd saves while active, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []  # alive until the end, so that no address is used twice
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def train_pass(model: nn.Module, images: Tensor, labels: Tensor, *, bf16: bool) -> float:
    """Return the seconds of one forward and backward pass."""
    wait_for(images.device)
    start = time.perf_counter()
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    wait_for(images.device)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_mib(model: nn.Module, images: Tensor) -> float:
    """Return the MiB per image that a forward pass leaves for the backward pass."""
    with count_saved(model) as saved:
        model(images)
    return sum(saved.values()) / 2**20 / len(images)


def measure(models: dict[str, nn.Module], step: Callable[[nn.Module], float], rounds: int) -> None:
    """Time all models in turn, `rounds` times after two rounds of warm-up, and print."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(rounds + 2):
        for name, model in models.items():
            spent = step(model)
            if index >= 2:
                seconds[name].append(spent)
    rival = seconds[RIVAL]
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, rival, strict=True)]
        spread = [round(value, 3) for value in (min(ratios), max(ratios))]
        row = {"model": name, "ratio": round(median(own) / median(rival), 3), "spread": spread}
        print(json.dumps({**row, "rival": RIVAL, "seconds": round(median(own), 4)}), flush=True)


def main() -> None:
    """Build, count, time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--compile", action="store_true", help="compile our models' blocks")
    parser.add_argument("--batch", type=int, default=8, help="images per pass")
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    arguments = parser.parse_args()
    unknown = set(arguments.models) - set(MODELS)
    if unknown:
        parser.error(f"unknown model {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, 224, 224, device=arguments.device)
    labels = torch.randint(1000, (arguments.batch,), device=arguments.device)
    models: dict[str, nn.Module] = {RIVAL: timm.create_model(RIVAL)}
    models |= {name: build(name) for name in arguments.models or DEFAULT}
    for name, model in models.items():
        model.to(arguments.device).train()
        row = {"model": name, "saved_mib_per_image": round(saved_mib(model, images), 1)}
        print(json.dumps(row), flush=True)
        if arguments.compile and name != RIVAL:
            wrap_blocks(model, MemoryConfig(compile=True))
    step = partial(train_pass, images=images, labels=labels, bf16=arguments.bf16)
    measure(models, step, arguments.rounds)


if __name__ == "__main__":
    main()
