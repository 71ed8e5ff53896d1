"""Whole loaders: files in, batches of uint8 pixels out, in CPU time an image of all processes.

    python benchmarks/loader.py [FOLDER] [--rounds N] [--only NAME ...]

FOLDER holds the files that tiles.py made. Ours reads them from packed shards with their regions;
the others have one worker process that reads files or, WebDataset, the same shards, decodes with
Pillow and crops with timm's or torchvision's transforms. CPU time is that of parent and worker,
relative to decoding the files in full with simplejpeg. One JSON line per loader, then how many
times faster ours is. Loaders that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# This file's own folder would otherwise hide packages of the same names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from benchmarks.rounds import Pass, full_decode, measure, report, skipped
from benchmarks.tiles import FOLDER, Tile, load
from data.augment import AugmentSpec
from data.base import Shard
from data.pack import pack_folder
from data.pipeline import ImagePipeline, open_source

OURS = {"ours": "ours"}
SIZE = 224
EPOCHS = 4  # of ours in a pass: the batches that it prepares in vain at the end weigh less


@dataclass(frozen=True)
class Setup:
    """Where the images lie, as files and in shards, and how many go into a batch."""

    folder: Path
    shards: Path
    batch: int


def ours(setup: Setup) -> Pass:
    """Our pipeline with one decoding thread."""
    source = open_source("webdataset", setup.shards)
    spec = AugmentSpec(size=SIZE)
    pipeline = ImagePipeline(source, augment=spec, global_batch=setup.batch, num_workers=1)
    steps = EPOCHS * pipeline.steps_per_epoch

    def run(index: int) -> int:
        start = replace(pipeline.start(), epoch=index * EPOCHS)
        with closing(pipeline.batches(start, Shard(rank=0, world_size=1))) as stream:
            return sum(_checked(batch.images) for batch, _ in islice(stream, steps))

    return run


def timm_transform() -> Any:
    """timm's training transform, as its scripts use it."""
    return create_transform(
        SIZE, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bicubic"
    )


def torchvision_transform() -> Any:
    """The same of torchvision's, its second version."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )


def data_loader(setup: Setup, transform: Any, make: Callable[..., Iterable[Any]]) -> Pass:
    """A DataLoader over the folder; a PyTorch user's first loader."""
    files = ImageFolder(str(setup.folder), transform=transform)
    loader = make(files, batch_size=setup.batch, shuffle=True, num_workers=1)
    return lambda _: sum(_checked(images) for images, _ in loader)


def web_dataset(setup: Setup) -> Pass:
    """WebDataset as its README has it, over our shards."""
    import webdataset

    urls = [str(path) for path in sorted(setup.shards.glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(timm_transform(), int)
        .batched(setup.batch)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=1)
    return lambda _: sum(_checked(images) for images, _ in loader)


def stateful(setup: Setup) -> Pass:
    """torchdata's loader, which can be resumed."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return data_loader(setup, timm_transform(), StatefulDataLoader)


LOADERS: dict[str, Callable[[Setup], Pass]] = {
    "ours": ours,
    "DataLoader, timm": lambda setup: data_loader(setup, timm_transform(), DataLoader),
    "DataLoader, torchvision": lambda setup: data_loader(
        setup, torchvision_transform(), DataLoader
    ),
    "WebDataset": web_dataset,
    "StatefulDataLoader": stateful,
}


def _checked(images: Any) -> int:
    """Count a batch that is one."""
    if 3 not in (images.shape[1], images.shape[3]) or images[0].float().std() < 1:
        raise SystemExit(f"no pictures: {images.shape}")
    return len(images)


def prepare(setup: Setup, only: list[str]) -> dict[str, Pass]:
    """Return a pass of every loader that is wanted and installed, each tried once."""
    methods: dict[str, Pass] = {}
    for name, build in LOADERS.items():
        if only and name not in [*only, *OURS]:
            continue
        try:
            methods[name] = build(setup)
            methods[name](0)
        except ImportError as error:
            skipped(name, error)
            methods.pop(name, None)
    return methods


def class_folder(folder: Path, tiles: list[Tile], target: Path) -> Path:
    """Link the tiles into `target`/CLASS/, away from what else lies in their folder."""
    shutil.rmtree(target, ignore_errors=True)
    for tile in tiles:
        (target / tile.file).parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / tile.file, target / tile.file)
    return target


def main() -> None:
    """Pack, prepare, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--only", nargs="*", default=[], help="these rivals")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiles = load(arguments.folder)
    if not tiles:
        raise SystemExit(f"{arguments.folder} holds no tiles; run benchmarks/tiles.py")
    files = class_folder(arguments.folder, tiles, arguments.folder / ".loader" / "files")
    shards = arguments.folder / ".loader" / "shards"
    pack_folder(files, shards, samples_per_shard=100, progress=lambda _: None)
    setup = Setup(files, shards, arguments.batch)
    images = [(files / tile.file).read_bytes() for tile in tiles]
    methods = prepare(setup, arguments.only)
    load_before = os.getloadavg()
    report(measure(methods, full_decode(images), arguments.rounds), OURS)
    print(json.dumps({"load_average": [load_before[0], os.getloadavg()[0]]}))


if __name__ == "__main__":
    main()
