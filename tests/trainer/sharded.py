"""Checkpoints as a run of two processes leaves them, of models that nothing was trained of."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from models.base import Backbone
from models.registry import build
from tests.trainer.runs import tiny_config
from trainer import manifest, shardfile
from trainer.manifest import Manifest
from trainer.shardfile import Box, Piece

STEP = 7


def randomised(name: str, *, size: int, num_classes: int) -> Backbone:
    """Return a model for evaluation whose every weight and statistic has a value of its own."""
    torch.manual_seed(0)
    model = build(name, img_size=size, num_classes=num_classes, drop_path=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                nn.init.normal_(buffer, std=0.1)
            elif key.endswith("running_var"):
                nn.init.uniform_(buffer, 0.9, 1.2)
    return model


def write_run(run_dir: Path, model: Backbone, *arguments: str) -> None:
    """Make `run_dir` the folder of a run that has just saved `model`, and measured it before."""
    (run_dir / "checkpoints").mkdir(parents=True)
    config = tiny_config(run_dir, "--train.ema-decay", "0", *arguments)
    (run_dir / "config.json").write_text(config.to_json())
    events = [
        {"kind": "eval", "step": STEP - 1, "top1": 1.0, "top5": 2.0},
        {"kind": "eval", "step": STEP, "top1": 61.25, "top5": 83.5},
    ]
    lines = [*map(json.dumps, events), '{"kind": "eval", "st']  # the last one is torn
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    staged = manifest.staging_folder(run_dir / "checkpoints", STEP, 0)
    staged.mkdir()
    files = tuple(_write_share(staged, model, rank) for rank in range(2))
    cursor = {"epoch": 1, "samples": 0, "seed": 0, "index": "abc123"}
    record = {"state": {"step": STEP, "cursor": cursor}, "model": config.model.name}
    manifest.commit(
        run_dir / "checkpoints", Manifest(step=STEP, generation=0, files=files, record=record)
    )


def _write_share(folder: Path, model: Backbone, rank: int) -> manifest.FileRecord:
    buffers = {name for name, _ in model.named_buffers()}
    pieces = []
    for name, tensor in model.state_dict().items():
        kind = "buffer" if name in buffers else "weight"
        box = Box.whole(tensor.shape).share(rank, 2)
        if box is not None:
            part = tensor[box.within(Box.whole(tensor.shape))].contiguous()
            dtype = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
            piece = Piece(f"{kind}/{name}", dtype, tuple(tensor.shape), box)
            pieces.append((piece, memoryview(part.numpy()).cast("B")))
    return shardfile.write(folder / f"rank_{rank:05d}.safetensors", pieces)
