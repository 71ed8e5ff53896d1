"""Small copies of the published test sets, with their layout: real JPEG files, few of them."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from tests.data.pictures import photograph
from trainer.evaluation.scores import ALEXNET_ERRORS

SYNSETS = ("n01440764", "n01498041", "n01531178", "n01534433")  # classes 0, 6, 11, 13
VARIANTS = ("n01443537", "n01484850", "n01494475")  # of ImageNet-R: classes 1, 2, 4


def write_sets(root, *, per_class=3):
    """Write every set below a folder and return the NAME=PATH of each."""
    generator = np.random.default_rng(3)
    names = iter(range(1, 10_000))

    def fill(folder, classes, count=per_class):
        for name in classes:
            for _ in range(count):
                path = folder / name / f"ILSVRC2012_val_{next(names):08d}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                tile(generator).save(path, quality=90)
        return folder

    paths = {"imagenet": fill(root / "val", SYNSETS)}
    real = [[] for _ in range(50_000)]
    for number in range(1, next(names)):
        if number % 4:
            real[number - 1] = sorted({number * 37 % 1000, number * 91 % 1000, 7})[: number % 3 + 1]
    (root / "real.json").write_text(json.dumps(real))
    paths["imagenet-real"] = paths["imagenet"]
    paths["imagenet-v2"] = fill(root / "v2", ("0", "2", "10", "999"))
    paths["imagenet-a"] = fill(root / "a", SYNSETS[1:])
    paths["imagenet-r"] = fill(root / "r", VARIANTS)
    paths["imagenet-sketch"] = fill(root / "sketch", SYNSETS)
    for kind in ALEXNET_ERRORS:
        for severity in range(1, 6):
            fill(root / "c" / kind / str(severity), SYNSETS[:2], count=1)
    paths["imagenet-c"] = root / "c"
    return [f"{name}={path}" for name, path in paths.items()]


def tile(generator):
    """A piece of a photograph in colours of its own, so that networks tell it from others."""
    left, top = generator.integers(0, 300, 2)
    pixels = np.asarray(PHOTOGRAPH.crop((left, top, left + 60, top + 48)), np.float32)
    tinted = pixels * generator.uniform(0.2, 1.4, 3) + generator.uniform(-60, 60, 3)
    return Image.fromarray(tinted.clip(0, 255).astype(np.uint8))


PHOTOGRAPH = photograph()
