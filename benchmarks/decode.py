"""What a random resized crop of 224 pixels costs from a JPEG file on: ours beside the others.

    python benchmarks/decode.py [FOLDER] [--rounds N] [--only NAME ...]

FOLDER holds the files that tiles.py made. Everything runs in one thread and is counted in CPU time
relative to decoding the files in full with simplejpeg (libjpeg-turbo, nothing else). One JSON line
per method, then how many times faster ours are. Ours decode by `AugmentSpec.render`, without and
with regions. Rivals that are not installed are skipped; opencv-python-headless, ffcv and
nvidia-dali-cuda120 are no dependencies of the project, nor is simplejpeg, which must be there.
DALI works without a GPU; FFCV is built from source, with Debian's libopencv-dev,
libturbojpeg0-dev and pkg-config.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# This file's own folder would otherwise hide packages of the same names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks import rivals
from benchmarks.rivals import Crop, One, Pixels, Whole, Work
from benchmarks.rounds import Pass, full_decode, measure, report, skipped
from benchmarks.tiles import FOLDER, load
from data.augment import AugmentSpec, crop_box
from data.base import Sample
from data.decode import open_image
from data.jpeg import build_regions
from data.randomness import Purpose, uniforms

OURS = {"ours, crop": "crop", "ours, regions": "regions"}
ONES: dict[str, Callable[[Work], One]] = {
    "torchvision": rivals.torchvision_tensor,
    "pillow": rivals.pillow,
    "timm": rivals.timm_transform,
    "opencv": rivals.opencv,
}
WHOLES: dict[str, Callable[[Work], Whole]] = {
    "ffcv jpg": rivals.ffcv_jpeg,
    "dali triangular": partial(rivals.dali, filter="INTERP_TRIANGULAR"),
    "dali cubic": partial(rivals.dali, filter="INTERP_CUBIC"),
}
SAME_CROP = ("torchvision", "pillow", "opencv")
SPEC = AugmentSpec(size=224)
SEED = 0


def draw_crops(sizes: list[tuple[int, int]], epoch: int) -> list[Crop]:
    """Return ours of an epoch, for the rivals that can be told; `_one` proves that they are."""
    keys = np.arange(len(sizes))
    flips = uniforms(SEED, epoch, keys, Purpose.FLIP, count=1)[:, 0] < SPEC.hflip
    draws = uniforms(SEED, epoch, keys, Purpose.CROP, count=23)
    draws[:, :10] = SPEC.scale[0] + draws[:, :10] * (SPEC.scale[1] - SPEC.scale[0])
    low, high = SPEC.ratio
    draws[:, 10:20] = low * np.exp(draws[:, 10:20] * np.log(high / low))
    crops = []
    for row, size, flip in zip(draws.tolist(), sizes, flips.tolist(), strict=True):
        box = crop_box(row[:10], row[10:20], (row[20], row[21]), size, limits=SPEC.ratio)
        crops.append(Crop(box, flip))
    return crops


def ours(work: Work, *, regions: bool) -> Callable[[int], Pixels]:
    """Return our way: epoch -> the first batch."""
    samples = [
        Sample(id=id, image=image, label=0, regions=build_regions(image) if regions else None)
        for id, image in enumerate(work.images)
    ]
    keys = np.arange(len(samples))

    def run(epoch: int) -> Pixels:
        first = None
        for start in range(0, len(samples), work.batch):
            rows = slice(start, start + work.batch)
            out = np.empty((len(samples[rows]), SPEC.size, SPEC.size, 3), np.uint8)
            failures = SPEC.render(samples[rows], keys[rows], out, seed=SEED, epoch=epoch)
            if failures:
                raise SystemExit(f"{len(failures)} files cannot be decoded")
            first = out if first is None else first
        assert first is not None, "there are images"
        return first

    return run


def prepare(work: Work, only: list[str], rounds: int) -> dict[str, Pass]:
    """Return what is to be measured, having looked at what it makes."""
    sizes = [open_image(image).size for image in work.images]
    crops = [draw_crops(sizes, epoch) for epoch in range(rounds + 1)]
    expected = ours(work, regions=False)(0)
    count = len(work.images)
    methods: dict[str, Pass] = {}
    for name in OURS:
        run = ours(work, regions=OURS[name] == "regions")
        if (run(0) != expected).any():
            raise SystemExit(f"{name}: other pixels")
        methods[name] = lambda epoch, run=run: len(run(epoch)) and count
    for name in [*ONES, *WHOLES]:
        if only and name not in only:
            continue
        try:
            methods[name] = (
                _one(name, work, crops, expected) if name in ONES else _whole(name, work)
            )
        except (ImportError, OSError) as error:
            skipped(name, error)
    return methods


def _one(name: str, work: Work, crops: list[list[Crop]], expected: Pixels) -> Pass:
    one = ONES[name](work)
    pixels = rivals.each(one, range(len(expected)), crops[0])
    difference = float(np.abs(pixels.astype(int) - expected).mean())
    print(json.dumps({"name": name, "mean_difference_from_ours": round(difference, 3)}))
    if pixels.shape != expected.shape or (name in SAME_CROP and difference > 4):
        raise SystemExit(f"{name}: not the same crops as ours")

    def run(epoch: int) -> int:
        for row, crop in enumerate(crops[epoch]):
            one(row, crop)
        return len(work.images)

    return run


def _whole(name: str, work: Work) -> Pass:
    whole = WHOLES[name](work)

    def run(epoch: int) -> int:
        del epoch
        last = whole()
        if last.shape[1:] != (work.size, work.size, 3) or last.std() < 20:
            raise SystemExit(f"{name}: no pictures")
        return len(work.images)

    run(0)
    return run


def main() -> None:
    """Read, prepare, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--limit", type=int, default=800, help="files used")
    parser.add_argument("--only", nargs="*", default=[], help="these rivals")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tiles = load(arguments.folder)[: arguments.limit]
    if not tiles:
        raise SystemExit(f"{arguments.folder} holds no tiles; run benchmarks/tiles.py")
    images = [(arguments.folder / tile.file).read_bytes() for tile in tiles]
    # All batches are full: what some would do with the rest is not the question.
    work = Work(
        images[: len(images) // arguments.batch * arguments.batch], arguments.batch, SPEC.size
    )
    mean = sum(map(len, work.images)) / len(work.images)
    print(json.dumps({"images": len(work.images), "mean_bytes": round(mean)}), flush=True)
    methods = prepare(work, arguments.only, arguments.rounds)
    load_before = os.getloadavg()
    report(measure(methods, full_decode(work.images), arguments.rounds), OURS)
    print(json.dumps({"load_average": [load_before[0], os.getloadavg()[0]]}))


if __name__ == "__main__":
    main()
