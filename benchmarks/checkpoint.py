"""The stall of a save in the background as a share of one that is waited for, in one run.

    python benchmarks/checkpoint.py [--mib 512] [--rounds 5] [--folder DIR] [--device cuda]
    torchrun --nproc-per-node 4 benchmarks/checkpoint.py ...

Every round saves the same state both ways in turn, so that whatever else the machine and its disk
do falls on both; only the ratio means anything. Each rank writes its share of the state, which is
the same on all. One JSON line per way, and one for the ratio; the slowest rank counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

# This file's own folder would otherwise hide the package of the same name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from launcher.process import Process
from trainer.checkpoint import Checkpointer, State
from trainer.group import gather, gloo_group, join


def stall(checkpointer: Checkpointer, state: State, step: int, *, waited_for: bool) -> float:
    """Save; return the seconds that the caller could not go on, on the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    checkpointer.save(state.items(), step, {}, keep=None)
    if waited_for:
        checkpointer.wait()
    seconds = time.perf_counter() - begin
    checkpointer.wait()
    return max(map(float, gather(seconds)))


def main() -> None:
    """Make a state, save it in turn, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mib", type=int, default=512, help="size of the whole state")
    parser.add_argument("--rounds", type=int, default=5, help="saves each way")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    process = Process.from_environment(os.environ)
    join(process, arguments.folder)
    state = {
        f"weight/{index}": torch.randn(1024, 1024, device=arguments.device)
        for index in range(arguments.mib // 4)
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint-") as name:
        root = Path(gather(name)[0])  # that of rank 0 for all
        checkpointer = Checkpointer(root, gloo_group(), keep_last=1)
        seconds: dict[str, list[float]] = {"background": [], "waited for": []}
        for index in range(arguments.rounds + 1):
            for offset, (way, spent) in enumerate(seconds.items()):
                found = stall(
                    checkpointer, state, 2 * index + offset, waited_for=way == "waited for"
                )
                if index > 0:  # the first round makes the buffers
                    spent.append(found)
        dist.barrier()
    if process.rank == 0:
        report(seconds, mib=arguments.mib, world_size=process.world_size)
    dist.destroy_process_group()


def report(seconds: dict[str, list[float]], *, mib: int, world_size: int) -> None:
    """Print a JSON line for each way, and one for the ratio."""
    for way, spent in seconds.items():
        row = {"save": way, "mib": mib, "processes": world_size}
        print(json.dumps({**row, "stall_s": [round(value, 4) for value in spent]}), flush=True)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    spread = [round(value, 3) for value in (min(ratios), max(ratios))]
    print(json.dumps({"stall_ratio": round(median(ratios), 3), "spread": spread}), flush=True)


if __name__ == "__main__":
    main()
