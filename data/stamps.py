"""A toy set for detection and segmentation: cut-outs of real things on real photographs.

Owns what it is made of (photographs and Tux Paint's stamps, out of Debian packages) and its files:
COCO's annotations, and index images as ADE20K has them. The cut-outs have alpha channels, so masks
are exact. Invariants: the validation split shares neither cut-outs nor photographs with the
training split; the same packages give the same pictures on every machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.base import DataError
from data.collage import HEIGHT, WIDTH, Instance, Scraps, compose, run_lengths
from data.columns import room_for
from data.debian import download, read_files
from data.pack import SPLITS
from data.progress import counting

COUNTS = {"train": 400, "val": 100}

_STAMPS = "tuxpaint-stamps-default"
_STAMPS_FOLDER = "usr/share/tuxpaint/stamps"
# Category: the folder, and its cut-outs that are photographs. The last quarter, rounded up, is for
# validation alone.
_CATEGORIES = {
    "bird": (
        "animals/birds",
        "blackbird crow duck drake silver-gull lark adelaide-rosella pigeon vulture peacock hen "
        "guineafowl turkey little-penguin nandou pelican heron_greatblue pink_flamingo "
        "magpie gander seagull rainbow-lorikeet rooster helmeted_guineafowl",
    ),
    "fish": (
        "animals/fish",
        "bluegroper butterflyfish coraltrout dolphinfish clownfish lionfish moonwrasse stripedfish",
    ),
    "insect": ("animals/insects", "grasshopper hornet xanthia mantis hoverfly fly"),
    "cattle": ("animals/mammals/bovines", "bison bull cow zebu cow_white yak"),
    "sheep or goat": ("animals/mammals/bovines", "ram sheep goat sheep_lamb mountaingoat"),
    "deer or antelope": (
        "animals/mammals",
        "deer/deer deer/wapiti bovines/indian_blackbuck bovines/gnu-stand bovines/gnu-baby "
        "bovines/gnu-sitting deer/caribou deer/doe bovines/gnu-baby-stand",
    ),
    "big cat": ("animals/mammals/cats", "lion lion-2 tiger tiger_sumatran"),
    "horse or donkey": ("animals/mammals/equines", "donkey horse zebra donkey_eating"),
    "rodent": ("animals/mammals/rodents", "beaver capybara marmot mouse squirrel rat"),
    "fruit": (
        "food/fruit",
        "apple_fuji apple_granny_smith apple_red banana mandarine orange sliced_orange strawberry "
        "Cherry_Stella apricot kiwi mango grapes pineapple pomegranate "
        "apple_green lemon Strawberry2 Apricot_whole pear",
    ),
    "vegetable": (
        "food/vegetables",
        "broccoli carrot chilepepper corn eggplant garlic onion pepper potato pumpkin_small "
        "lettuce yellowpepper redlettuce tomato garlics",
    ),
    "flower": (
        "plants/flowers",
        "adeenia anemone_red anthoorium bolsom daffodil flower1 flower10 flower2 flower4 flower6 "
        "flower8 iris marigold red-gazania rose "
        "flower5 flower9 pigface whitestar-petunia yellow-flower",
    ),
    "stringed instrument": (
        "hobbies/music/string",
        "cello guitar_classical guitar_electric guitar2 guitar_electric_bass violin",
    ),
    "tool": (
        "household/tools",
        "hammer plyers saw spade wrench_plumbers wrench mallet_metal wrench_adjustable",
    ),
    "ball": (
        "sports",
        "basketball football soccer tennis_ball cricketball australian_rules_football",
    ),
    "vehicle": (
        "vehicles",
        "auto/beetle auto/sedan auto/truck construction/dumper emergency/firetruck race/indycar "
        "auto/sportscar2 garbagetruck masstransit/green_korean_bus",
    ),
}
CLASSES = ("background", *_CATEGORIES)
"""What the values of the index images mean; the place of a name is COCO's category id, too."""

# Package: the folder, and its photographs in which none of the categories is to be seen. The last
# quarter, rounded up, is for validation alone.
_PHOTOGRAPHS = {
    "lomiri-wallpapers-16.04": (
        "usr/share/backgrounds",
        "Picture_1A_by_freespace Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi "
        "greentock_by_Peter_Nerlich sunset_by_Aitzol_Berasategi Bridge_by_Sander_Klootwijk "
        "life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi",
    ),
    "tuxpaint-data": (
        "usr/share/tuxpaint/templates",
        "burnt_bark cliff jellyfish lighthouse mudstone ocean_splash rocks spiders_web "
        "sun_behind_clouds trees_above trees_at_dusk wool_mill_machine "
        "corn_maze mossy_log ocean_waves redwoods_above sun_behind_leaves",
    ),
}


def fetch_stamps(out: Path, *, progress: Callable[[str], None] = print) -> None:
    """Make the set in the folder `out`, which appears when it is complete.

    A finished one is left alone. Packages that were downloaded are kept beside `out` until then.
    Another process that makes the same folder is waited for. Raises DataError if `out` holds
    anything else, a package is not to be had or damaged, or the disk is full.
    """
    if _is_complete(out):
        progress(f"{out} holds the pictures already")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is in the way: it holds no complete set; remove or rename it")
    if out.resolve() == Path.cwd():
        raise DataError(f"{out} is the current folder, which cannot be replaced; name another")
    with room_for(out), _alone_beside(out, progress) as beside:
        if not _is_complete(out):  # made by another process meanwhile
            packages = {name: download(name, beside, progress=progress) for name in source_files()}
            finished = beside / "finished"
            shutil.rmtree(finished, ignore_errors=True)
            _make(packages, finished, progress)
            finished.rename(out)
        shutil.rmtree(beside, ignore_errors=True)
    progress(f"{out} holds {COUNTS['train']} + {COUNTS['val']} pictures")


def source_files() -> dict[str, list[str]]:
    """Return the files that the set is made of, by the package that they are in."""
    photographs = {
        package: [f"{folder}/{stem}.jpg" for stem in stems.split()]
        for package, (folder, stems) in _PHOTOGRAPHS.items()
    }
    return {_STAMPS: [name for names in _cutout_names() for name in names], **photographs}


def _make(packages: dict[str, Path], folder: Path, progress: Callable[[str], None]) -> None:
    """Write the whole set into `folder`."""
    progress("reading the packages")
    contents: dict[str, bytes] = {}
    for package, names in source_files().items():
        contents |= read_files(packages[package], [*names, _notes(package)])
    scraps = _scraps(contents)
    with counting(sum(COUNTS.values()), "picture", progress) as done:
        for split in SPLITS:
            for number in _write_split(folder, split, scraps[split]):
                done(1, f"{split}: {number + 1} of {COUNTS[split]} pictures")
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    _write_sources(folder, packages, contents)


def _write_split(folder: Path, split: str, scraps: Scraps) -> Iterator[int]:
    """Write the pictures of a split and what is in them; yields the number of each."""
    semantic = folder / f"{split}_semantic"
    for place in (folder / split, semantic, folder / "annotations"):
        place.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(COUNTS[split]):
        pixels, instances = compose(scraps, split=split, number=number)
        index = np.zeros((HEIGHT, WIDTH), np.uint8)
        for instance in instances:
            index[instance.mask] = instance.category
            annotations.append(_annotate(instance, image=number + 1, id=len(annotations) + 1))
        name = f"{number:06d}"
        Image.fromarray(pixels).save(folder / split / f"{name}.jpg", quality=90)
        Image.fromarray(index).save(semantic / f"{name}.png")
        images.append(
            {"id": number + 1, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT}
        )
        yield number
    content = {
        "info": {"description": "photographed things, pasted on photographs; see SOURCES.txt"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id, "name": CLASSES[id]} for id in range(1, len(CLASSES))],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _annotate(instance: Instance, *, image: int, id: int) -> dict[str, Any]:
    """Return COCO's record of an instance."""
    rows, columns = np.flatnonzero(instance.mask.any(1)), np.flatnonzero(instance.mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": id,
        "image_id": image,
        "category_id": instance.category,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(instance.mask.sum()),
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": run_lengths(instance.mask)},
        "iscrowd": 0,
    }


def _cutout_names() -> list[list[str]]:
    """Return each category's files in the package of stamps."""
    return [
        [f"{_STAMPS_FOLDER}/{folder}/{stem}.png" for stem in stems.split()]
        for folder, stems in _CATEGORIES.values()
    ]


def _notes(package: str) -> str:
    """Return the file in which a Debian package names its authors and licences."""
    return f"usr/share/doc/{package}/copyright"


def _scraps(contents: dict[str, bytes]) -> dict[str, Scraps]:
    """Return what each split is made of."""
    cutouts = [_split([_cutout(contents[name]) for name in names]) for names in _cutout_names()]
    names = source_files()
    photographs = [
        _split([_photograph(contents[name]) for name in names[package]]) for package in _PHOTOGRAPHS
    ]
    return {
        split: Scraps(
            photographs=[image for parts in photographs for image in parts[split]],
            cutouts=[parts[split] for parts in cutouts],
        )
        for split in SPLITS
    }


def _split(images: list[Image.Image]) -> dict[str, list[Image.Image]]:
    for_training = len(images) * 3 // 4
    return {"train": images[:for_training], "val": images[for_training:]}


def _cutout(content: bytes) -> Image.Image:
    """Return RGBA without the empty margin."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def _photograph(content: bytes) -> Image.Image:
    """Return RGB at an eighth of its size or more, but not much larger than needed."""
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (4 * WIDTH, 4 * HEIGHT))
    return image.convert("RGB")


def _write_sources(folder: Path, packages: dict[str, Path], contents: dict[str, bytes]) -> None:
    """Say what the set was made from, and put the packages' own licence notes beside."""
    (folder / "licences").mkdir()
    lines = [
        "The pictures are made from the files below, of Debian packages. Who made them and what",
        "their licences allow is in the folder licences, in the words of the packages: mind it",
        "before you pass pictures on.",
    ]
    for package, names in source_files().items():
        path = packages[package]
        (folder / "licences" / f"{package}.txt").write_bytes(contents[_notes(package)])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines += ["", f"{path.name} (SHA-256 {digest})", *(f"    {name}" for name in names)]
    (folder / "SOURCES.txt").write_text("\n".join(lines) + "\n")


def _is_complete(out: Path) -> bool:
    """Whether all files of the set are there, of these classes."""
    counts = {
        folder: len(list((out / folder).glob("0*")))
        for split in SPLITS
        for folder in (split, f"{split}_semantic")
    }
    tables = [out / "annotations" / f"instances_{split}.json" for split in SPLITS]
    return (
        all(count == COUNTS[folder.removesuffix("_semantic")] for folder, count in counts.items())
        and all(table.is_file() for table in tables)
        and (out / "classes.json").is_file()
        and (out / "classes.json").read_text() == json.dumps(CLASSES)
    )


@contextmanager
def _alone_beside(out: Path, progress: Callable[[str], None]) -> Iterator[Path]:
    """Yield a folder beside `out` that no other process works in, once none does."""
    beside = out.with_name(f".{out.name}.part")
    beside.mkdir(parents=True, exist_ok=True)
    with (beside / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that makes {out}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield beside
