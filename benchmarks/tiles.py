"""ImageNet-like JPEG files for benchmarks, cut out of photographs that Debian packages contain.

    python benchmarks/tiles.py [FOLDER] [--count N] [--seed N]

The packages come from this machine's Debian mirror (`apt-get download`, which needs no rights; run
`apt-get update` first where the lists are missing) and are unpacked beside the tiles, not
installed. Sizes, bytes per pixel and colour subsampling are spread as in ImageNet-1k; every tile
is a function of the seed and its number. FOLDER/PACKAGE/NUMBER.jpg is laid out as a folder of
classes, and FOLDER/photos.json says what each tile was made from; those that are there are kept.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FOLDER = Path("datasets/photos")
_LOMIRI = "usr/share/backgrounds/"
_MATE = "usr/share/backgrounds/mate/nature/"
_OPENCV = "usr/share/doc/opencv-doc/examples/"
_PLASMA = "usr/share/wallpapers/"
# Chosen by eye: photographs alone, none twice, none that is mostly clear sky or out of focus. Two
# more packages of backgrounds, gnome-backgrounds and ukui-wallpapers, hold drawings.
PACKAGES = {
    "lomiri-wallpapers-16.04": [
        _LOMIRI + name
        for name in (
            "Dragonfly_by_Bolly.jpg",
            "Picture_0B_by_freespace.jpg",
            "Picture_1A_by_freespace.jpg",
            "Wine_by_Jakkub_Mede.jpg",
            "aitzgorri_by_Aitzol_Berasategi.jpg",
            "friends_by_Aitzol_Berasategi.jpg",
            "life_by_Aitzol_Berasategi.jpg",
            "picosdeeuropa_by_Aitzol_Berasategi.jpg",
            "seeding_by_Clements_Engelhardt.jpg",
            "sunset_by_Aitzol_Berasategi.jpg",
        )
    ],
    "lomiri-wallpapers-20.04": [_LOMIRI + "Kleiber_by_Lukas_Baubkus.jpg"],
    "mate-backgrounds": [
        _MATE + f"{name}.jpg"
        for name in (
            *("Blinds", "Dune", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "TwoWings"),
            *("Wood", "YellowFlower"),
        )
    ],
    "opencv-doc": [
        *(_OPENCV + f"data/{name}.jpg" for name in ("aloeL", "baboon", "board", "building")),
        *(_OPENCV + f"data/{name}.jpg" for name in ("ela_original", "fruits", "leuvenA")),
        *(_OPENCV + f"data/{name}.png" for name in ("chicky_512", "graf1", "rubberwhale1")),
        _OPENCV + "data/squirrel_cls.jpg",
        _OPENCV + "alphamat/input_images/plant.jpg",
        _OPENCV + "text/scenetext*.jpg",
    ],
    "plasma-workspace-wallpapers": [
        _PLASMA + f"{name}/contents/images/2560x1600.jpg"
        for name in (
            *("BytheWater", "ColdRipple", "ColorfulCups", "EveningGlow", "FallenLeaf", "Grey"),
            *("OneStandsOut", "Path"),
        )
    ],
}
SIZES = {  # width, height -> share of the tiles
    (500, 375): 0.50,
    (375, 500): 0.16,
    (500, 333): 0.12,
    (333, 500): 0.05,
    (400, 300): 0.04,
    (500, 500): 0.03,
    (320, 240): 0.03,
    (500, 400): 0.03,
    (640, 480): 0.02,
    (800, 600): 0.0125,
    (1024, 768): 0.005,
    (1600, 1200): 0.0025,
}
_DOWNSCALES = (1.0, 0.7, 0.5, 0.35, 0.25)  # a photograph seen whole has more detail
_BYTES_PER_PIXEL = 0.57  # mean of the targets; ImageNet-1k has 110 KB on about 400 x 350 pixels
_SPREAD = 0.33  # standard deviation of its logarithm
_QUALITIES = (40, 98)
_SHARE_444 = 0.2
_PLACES = 8  # tried until one has detail enough to reach its bytes at the highest quality
_SAVE_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a tile was made from. `size` is its width and height, `num_bytes` the file's."""

    file: str
    source: str
    size: tuple[int, int]
    quality: int
    subsampling: str
    downscale: float
    num_bytes: int


class Cut(NamedTuple):
    """A tile: the JPEG file, and how it was made."""

    image: bytes
    quality: int
    subsampling: str
    downscale: float


def fetch(folder: Path) -> list[tuple[str, Path]]:
    """Return (package, photograph) of all that can be had, packages that are missing fetched."""
    photos = []
    for package, patterns in PACKAGES.items():
        unpacked = folder / ".packages" / package
        if not unpacked.is_dir():
            _unpack(package, unpacked)
        for pattern in patterns:
            photos += [(package, path) for path in sorted(unpacked.glob(pattern))]
    try:
        from sklearn import datasets
    except ImportError:
        print("skipped scikit-learn: not installed")
    else:
        images = Path(datasets.__file__).parent / "images"
        photos += [("scikit-learn", path) for path in sorted(images.glob("*.jpg"))]
    return photos


def _unpack(package: str, target: Path) -> None:
    """Download a Debian package and unpack it to `target`; say so where that is impossible."""
    downloads = target.parent / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{package}.part{os.getpid()}")
    # apt drops its rights to a user who may not write here, warns, and does it as the caller.
    commands = (["apt-get", "download", "-q", package], ["dpkg-deb", "-x", "", str(beside)])
    try:
        subprocess.run(commands[0], cwd=downloads, check=True, capture_output=True, text=True)
        commands[1][2] = str(next(downloads.glob(f"{package}_*.deb")).resolve())
        subprocess.run(commands[1], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        print(f"skipped {package}: {' '.join(reason)}; does `apt-get update` help?")
        return
    beside.rename(target)


@lru_cache(maxsize=3)
def _open(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def choose(photos: list[tuple[str, Path]], seed: int, number: int) -> tuple[int, tuple[int, int]]:
    """Return tile `number`'s photograph, more often a large one, and its width and height."""
    random = np.random.default_rng([seed, number])
    size = list(SIZES)[int(random.choice(len(SIZES), p=list(SIZES.values())))]
    areas = []
    for _, path in photos:
        width, height = Image.open(path).size
        fits = width >= size[0] and height >= size[1]
        areas.append(min(width * height / (size[0] * size[1]), 24.0) if fits else 0.0)
    shares = np.array(areas) / sum(areas)
    return int(random.choice(len(photos), p=shares)), size


def cut(photo: Image.Image, size: tuple[int, int], seed: int, number: int) -> Cut:
    """Cut tile `number`, of this width and height, out of its photograph."""
    random = np.random.default_rng([seed, number, 1])
    subsampling = "4:4:4" if random.random() < _SHARE_444 else "4:2:0"
    mean = math.log(_BYTES_PER_PIXEL * size[0] * size[1]) - _SPREAD**2 / 2
    target = math.exp(random.normal(mean, _SPREAD))
    least = max(size[0] / photo.width, size[1] / photo.height)
    scales = [scale for scale in _DOWNSCALES if scale >= least]
    best: tuple[int, Image.Image, float] = (-1, photo, 1.0)
    for _ in range(_PLACES):
        scale = float(random.choice(scales))
        width, height = (side / scale for side in size)
        left = random.uniform(0, photo.width - width)
        top = random.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        tile = photo.resize(size, Image.Resampling.LANCZOS, box=box)
        num_bytes = len(_encode(tile, _QUALITIES[1], subsampling))
        if num_bytes > best[0]:
            best = (num_bytes, tile, scale)
        if num_bytes > target:
            break
    quality = _quality(best[1], subsampling, target)
    return Cut(_encode(best[1], quality, subsampling), quality, subsampling, best[2])


def _quality(tile: Image.Image, subsampling: str, target: float) -> int:
    """Return the highest quality with which the file is no larger than `target` bytes."""
    low, high = _QUALITIES
    while low < high:
        middle = (low + high + 1) // 2
        if len(_encode(tile, middle, subsampling)) <= target:
            low = middle
        else:
            high = middle - 1
    return low


def _encode(tile: Image.Image, quality: int, subsampling: str) -> bytes:
    file = io.BytesIO()
    tile.save(file, "JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


def make(folder: Path, *, count: int, seed: int) -> list[Tile]:
    """Make the tiles 0 to `count` - 1 that `folder` lacks, and return all of them."""
    photos = fetch(folder)
    if not photos:
        raise SystemExit("no photographs: none of the packages could be had")
    done = {tile.file: tile for tile in load(folder)}
    chosen = [(*choose(photos, seed, number), number) for number in range(count)]
    tiles: list[Tile] = []
    made = 0
    for photo, size, number in sorted(chosen):  # photograph by photograph: each is opened once
        package, path = photos[photo]
        name = f"{package}/{number:05d}.jpg"
        if name not in done or not (folder / name).is_file():
            tile = cut(_open(path), size, seed, number)
            (folder / package).mkdir(exist_ok=True)
            (folder / name).write_bytes(tile.image)
            done[name] = Tile(
                file=name,
                source=path.name if path.stem[0].isalpha() else path.parents[2].name,
                size=size,
                quality=tile.quality,
                subsampling=tile.subsampling,
                downscale=tile.downscale,
                num_bytes=len(tile.image),
            )
            made += 1
            if made % _SAVE_EVERY == 0:
                _save(folder, list(done.values()))
        tiles.append(done[name])
    _save(folder, list(done.values()))
    return tiles


def load(folder: Path) -> list[Tile]:
    """Return the tiles that `folder` holds, by number."""
    try:
        rows = json.loads((folder / "photos.json").read_text())
    except FileNotFoundError:
        return []
    return [Tile(**{**row, "size": tuple(row["size"])}) for row in rows]


def _save(folder: Path, tiles: list[Tile]) -> None:
    ordered = sorted(tiles, key=lambda tile: Path(tile.file).name)
    text = ",\n".join(json.dumps(asdict(tile)) for tile in ordered)
    beside = folder / f"photos.json.part{os.getpid()}"
    beside.write_text(f"[\n{text}\n]\n")
    beside.replace(folder / "photos.json")


def main() -> None:
    """Make the tiles and say what they are like."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--count", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tiles = make(arguments.folder, count=arguments.count, seed=arguments.seed)
    sizes = np.array([tile.num_bytes for tile in tiles])
    pixels = np.array([math.prod(tile.size) for tile in tiles])
    summary = {
        "tiles": len(tiles),
        "photographs": len({tile.source for tile in tiles}),
        "mean_kb": round(float(sizes.mean()) / 1000, 1),
        "median_kb": round(float(np.median(sizes)) / 1000, 1),
        "mean_pixels": round(float(pixels.mean())),
        "median_quality": int(np.median([tile.quality for tile in tiles])),
        "share_444": round(float(np.mean([tile.subsampling == "4:4:4" for tile in tiles])), 3),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
