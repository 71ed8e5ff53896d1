"""What the training loop costs: ours beside a bare loop of the same model, data and world size.

    python benchmarks/loop.py [--rounds N] [--steps N] [--SECTION.SETTING VALUE ...]
    torchrun --nproc-per-node 2 benchmarks/loop.py ...

The bare loop is what one would write by hand: batches, mixing, autocast, DDP, backward pass,
clipping, AdamW, and nothing else: no schedule, record, metrics, signals, watchdog or checkpoints.
Neither has drop path or a moving average. The two take turns in one process; times are those from
one step to the next, the first ones left out. One JSON line per round with both medians in
milliseconds, then the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from itertools import islice, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data.base import Batch, Cursor, Shard
from launcher.process import Process
from trainer.backends.wrap import build_model, synchronise_batch_norm
from trainer.config import RunConfig, override
from trainer.group import gather, join
from trainer.inputs import make_mixer, make_stream
from trainer.loop import Trainer
from trainer.recipes import recipe
from trainer.task import classification

_WARM_UP = 5  # steps of each run that are not counted
_SETTINGS = (
    *("--data.source", "synthetic", "--data.val", "num_samples=32,num_classes=10,size=32"),
    *("--train.batch-size", "64", "--train.epochs", "1", "--eval.every-epochs", "9"),
    *("--checkpoint.every", "100000", "--checkpoint.no-async-save", "--log.every", "10"),
    *(
        "--backend.name",
        "ddp",
        "--optim.clip-grad",
        "5",
        "--model.drop-path",
        "0",
        "--train.ema-decay",
        "0",
    ),
)


def ours(config: RunConfig, process: Process) -> list[float]:
    """Return the moments at which our loop began its steps, in seconds."""
    moments: list[float] = []
    trainer = Trainer(config, process)
    advance = trainer.advance

    def timed(data: Sequence[tuple[Batch, Cursor]]) -> dict[str, torch.Tensor]:
        moments.append(time.perf_counter())
        return advance(data)

    trainer.advance = timed
    trainer.run()
    return moments


def bare(config: RunConfig, process: Process) -> list[float]:
    """Return the moments at which a bare loop began its steps, in seconds."""
    moments: list[float] = []
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", process.local_rank) if cuda else torch.device("cpu")
    model = build_model(config.model, seed=0, device=device)
    synchronise_batch_norm(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    pipeline, mix = make_stream(config, device), make_mixer(config)
    bf16 = config.train.precision == "bf16"
    shard = Shard(rank=process.rank, world_size=process.world_size)
    with closing(pipeline.batches(pipeline.start(), shard)) as stream:
        for batch, _ in islice(stream, pipeline.steps_per_epoch):
            moments.append(time.perf_counter())
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                images, targets = mix(batch)
                loss = classification(wrapped, images, targets, None, z_loss=0.0)
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
    return moments


def step_ms(moments: list[float]) -> float:
    """Return the median time from one step to the next, warm-up aside, in milliseconds."""
    return 1e3 * statistics.median(b - a for a, b in pairwise(moments[_WARM_UP:]))


def main() -> None:
    """Run both in turn, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    arguments, overrides = parser.parse_known_args()
    process, ratios = Process.from_environment(os.environ), []
    join(process, Path(tempfile.gettempdir()))
    for index in range(arguments.rounds + 1):
        with tempfile.TemporaryDirectory(prefix="loop-") as name:
            # Ranks meet in rank 0's folder.
            settings = [*_SETTINGS, "--run-dir", gather(name)[0]]
            batch = override(recipe("demo"), [*settings, *overrides]).train.batch_size
            samples = f"num_samples={arguments.steps * batch},num_classes=10,size=32"
            config = override(recipe("demo"), [*settings, "--data.train", samples, *overrides])
            with redirect_stdout(sys.stderr):
                found = {run.__name__: step_ms(run(config, process)) for run in (ours, bare)}
            dist.barrier()
        if index > 0 and process.rank == 0:  # the first round warms up
            ratios.append(found["ours"] / found["bare"])
            print(json.dumps({"round": index, **found, "ratio": ratios[-1]}), flush=True)
    if process.rank == 0:
        ends = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        print(json.dumps({"world_size": process.world_size, "ours / bare": ends}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that tears down normally


if __name__ == "__main__":
    main()
