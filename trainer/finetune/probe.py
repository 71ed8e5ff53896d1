"""What frozen features are worth: a linear probe and a k-nearest-neighbour classifier.

The features of both splits, pooled as the classifier sees them, are computed once and kept in the
folder; all learning rates of the probe are then tried in one pass over them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.augment import EvalSpec
from data.base import Shard, Source
from data.mixing import normalize
from data.pipeline import eval_batches, open_source
from launcher.process import Process
from trainer.config import UserError
from trainer.group import join
from trainer.manifest import write_atomically
from trainer.precision import autocast
from trainer.pretrained import Pretrained

TEMPERATURE = 0.07  # of the k-NN votes (Wu et al., https://arxiv.org/abs/1805.01978)
HELD_OUT = 10  # of so many training images, one chooses the learning rate
RESULT = "probe.json"


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """Labelled images."""

    source: Literal["webdataset", "ffcv", "folder", "synthetic"] = "webdataset"
    """Storage: indexed tar or .beton shards, one folder per class, or generated."""
    train: str = "datasets/imagenet/train"
    """Folder or URL of the training split."""
    val: str = "datasets/imagenet/val"
    """Folder or URL of the evaluation split."""
    num_workers: int = 8
    """Decoding threads per process."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """All of a probe."""

    backbone: str
    """A run folder, checkpoint, bundle or weight file; a model's name probes initial weights."""
    out: str
    """The folder for features and scores."""
    data: ProbeData = field(default_factory=ProbeData)
    img_size: int | None = None
    """Image side in pixels; unset takes the model's own."""
    batch_size: int = 256
    """Images per forward pass, over all processes."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute type of the features."""
    lr: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Learning rates that the probe tries at once."""
    epochs: int = 50
    """Passes of the probe over the training features."""
    probe_batch: int = 1024
    """Features per step of the probe."""
    neighbours: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that the k-NN classifier tries."""
    seed: int = 0
    """Seed of the probe's order."""

    def validate(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        return list(self._problems())

    def _problems(self) -> Iterator[str]:
        for name in ("lr", "neighbours"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                yield f"{name} is {getattr(self, name)}: give values above 0"
        for name in ("batch_size", "epochs", "probe_batch", "img_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                yield f"{name} is {value}: it must be at least 1"


def probe(settings: ProbeSettings, source: Pretrained, process: Process) -> None:
    """Compute or find the features, score them, print and write OUT/probe.json.

    All processes compute features; the first one scores them.

    Raises:
        UserError: if the data do not fit one another or the folder cannot be written.
        DataError: if the data cannot be read.
    """
    folder = Path(settings.out)
    device = join(process, folder)
    sides = [open_source(settings.data.source, where) for where in _splits(settings)]
    if sides[0].classes != sides[1].classes:
        raise UserError(
            f"{settings.data.train} and {settings.data.val} have other classes: probe splits of "
            "one data set"
        )
    for name, split in zip(("train", "val"), sides, strict=True):
        _compute(settings, source, split, name, device)
    dist.barrier()
    if process.rank == 0:
        _score(settings, sides, device)
    dist.barrier()  # nobody leaves before the last: srun ends a job that some have left


def _score(settings: ProbeSettings, sides: list[Source], device: torch.device) -> None:
    folder = Path(settings.out)
    (x, y), (x_val, y_val) = (
        _load(folder, name, len(split)) for name, split in zip(("train", "val"), sides, strict=True)
    )
    x, y, x_val, y_val = (tensor.to(device) for tensor in (x, y, x_val, y_val))
    classes = len(sides[0].classes)
    scores = linear_probe(x, y, x_val, y_val, classes=classes, settings=settings)
    for count in settings.neighbours:
        if count <= len(x):
            scores[f"knn_{count}"] = knn(x, y, x_val, y_val, classes=classes, count=count)
    found = {"scores": scores, "settings": dataclasses.asdict(settings)}
    write_atomically(folder / RESULT, json.dumps(found, indent=2) + "\n")
    print("  ".join(f"{name} {value:.2f}" for name, value in scores.items()), flush=True)
    print(f"wrote {folder / RESULT}", flush=True)


def _splits(settings: ProbeSettings) -> tuple[str, str]:
    return settings.data.train, settings.data.val


def _compute(
    settings: ProbeSettings, source: Pretrained, split: Source, name: str, device: torch.device
) -> None:
    """Write this process's share of a split's features, unless all of them are there already."""
    folder, rank, world_size = Path(settings.out), dist.get_rank(), dist.get_world_size()
    side = settings.img_size or source.config.img_size
    key = {
        "data": split.fingerprint,
        "backbone": _weights_key(source),
        "side": str(side),
        "precision": settings.precision,
        "shares": str(world_size),
    }
    path = _share(folder, name, rank)
    if _is_there(path, key):
        return
    model = source.model.to(device)
    model.reset_buffers((side, side))
    batches = eval_batches(
        split,
        EvalSpec(size=side, crop_pct=source.crop_pct, squash=side >= 384),
        batch_size=-(-settings.batch_size // world_size),
        shard=Shard(rank=rank, world_size=world_size),
        num_workers=settings.data.num_workers,
        device=device,
    )
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    bar = tqdm(total=len(split), unit="image", desc=f"features of {name}", disable=rank > 0)
    with closing(batches), torch.no_grad(), autocast(device, settings.precision), bar:
        for batch in batches:
            images = normalize(batch.images, mean=source.mean, std=source.std)
            pooled = model.pool(model.forward_features(images)[-1]).float()
            valid = batch.valid
            parts.append((pooled[valid].cpu(), batch.labels[valid].cpu(), batch.ids[valid.cpu()]))
            bar.update(int(valid.sum()) * world_size)
    features, labels, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features, "labels": labels, "ids": ids}, part, metadata=key)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def _weights_key(source: Pretrained) -> str:
    """Tell one network from another: a sum over all weights, and where they are from."""
    total = sum(float(value.double().abs().sum()) for value in source.model.parameters())
    return f"{source.config.name} {total!r}"


def _share(folder: Path, name: str, rank: int) -> Path:
    return folder / "features" / f"{name}_{rank:05d}.safetensors"


def _is_there(path: Path, key: dict[str, str]) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return bool(file.metadata() == key)
    except (OSError, SafetensorError):
        return False


def _load(folder: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Return all features [n, C], of unit length, and labels [n] in the order of the images."""
    features, labels = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for rank in range(dist.get_world_size()):
        with safe_open(_share(folder, name, rank), "pt") as file:
            part = {key: file.get_tensor(key) for key in ("features", "labels", "ids")}
        if rank == 0:
            features = torch.empty(count, part["features"].shape[1])
            labels = torch.empty(count, dtype=torch.int64)
        features[part["ids"]] = part["features"]
        labels[part["ids"]] = part["labels"]
    return features, labels


def linear_probe(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, *, classes: int, settings: ProbeSettings
) -> dict[str, float]:
    """Return `linear`, the top-1 of the best learning rate in percent, and that `linear_lr`.

    x is [n, C] and y [n]. Features are standardised; a linear layer for each learning rate is
    trained on them by SGD with momentum 0.9 on a cosine, as for MoCo (arXiv 1911.05722). Every
    tenth training image is held out to choose the rate, so that the evaluation chooses nothing.
    """
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x, x_val = (x - mean) / std, (x_val - mean) / std
    generator = torch.Generator().manual_seed(settings.seed)
    shuffled = torch.randperm(len(x), generator=generator).to(x.device)
    held = max(1, len(x) // HELD_OUT)
    choosing, learning = shuffled[:held], shuffled[held:]
    rates = torch.tensor(settings.lr, device=x.device)[:, None, None]
    weight = torch.zeros(len(settings.lr), x.shape[1] + 1, classes, device=x.device)
    momentum = torch.zeros_like(weight)
    per_epoch = -(-len(learning) // settings.probe_batch)
    total = settings.epochs * per_epoch
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(learning), generator=generator).to(x.device)
        begin = step % per_epoch * settings.probe_batch
        chosen = learning[order[begin : begin + settings.probe_batch]]
        inputs, targets = _with_one(x[chosen]), F.one_hot(y[chosen], classes)
        error = (inputs @ weight).softmax(dim=2) - targets
        momentum = 0.9 * momentum + inputs.T @ error / len(chosen)
        decay = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / total)).item())
        weight -= rates * decay * momentum
    best = int(_top1(weight, x[choosing], y[choosing]).argmax())
    return {
        "linear": float(_top1(weight, x_val, y_val)[best]),
        "linear_lr": settings.lr[best],
    }


def _with_one(x: Tensor) -> Tensor:
    """Append a column of ones, whose weights are the biases."""
    return F.pad(x, (0, 1), value=1.0)


def _top1(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The accuracy [L] of linear layers [L, C + 1, classes] in percent."""
    right = torch.zeros(len(weight), device=x.device)
    for images, labels in zip(torch.split(x, 4096), torch.split(y, 4096), strict=True):
        right += ((_with_one(images) @ weight).argmax(dim=2) == labels).sum(dim=1)
    return 100 * right / len(x)


def knn(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, *, classes: int, count: int) -> float:
    """Return the top-1 in percent of the weighted vote of the `count` nearest training images.

    Nearness is the cosine s, and a vote weighs exp(s / 0.07) (Wu et al., arXiv 1805.01978).
    """
    x, x_val = F.normalize(x, dim=1), F.normalize(x_val, dim=1)
    right = 0
    for images, labels in zip(torch.split(x_val, 256), torch.split(y_val, 256), strict=True):
        nearness, nearest = (images @ x.T).topk(count, dim=1)
        votes = torch.zeros(len(images), classes, device=x.device)
        votes.scatter_add_(1, y[nearest], (nearness / TEMPERATURE).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return 100 * right / len(x_val)
