"""The published test sets as they lie on disk, and any other folder or shards with labels.

Owns what their folders are called, which class each stands for, and how many images a whole set
has. Invariant: what is wrong with a path is said before anything is evaluated, so that nobody
finds out after an hour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.base import Sample, Source
from data.pipeline import open_source

from ..config import UserError
from .scores import ALEXNET_ERRORS, SEVERITIES

_MANIFEST = "manifest.json"  # what a folder of indexed shards has
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_SHOWN = 3  # names that a message lists
_ALIKE = 0.9  # so that imagenet_a is taken for imagenet-a, and imagenet100 for nothing


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published test set. A `folder` stands for a class: its WordNet id, or its number.

    `classes` names the file that lists the classes which occur; predictions are then made among
    these. `images` is how many a complete copy holds.
    """

    images: int
    folder: str = "WordNet id (n01440764, ...)"
    classes: str | None = None


BENCHMARKS = {
    "imagenet": Benchmark(images=50_000),
    "imagenet-v2": Benchmark(images=10_000, folder="class number (0 to 999)"),
    "imagenet-a": Benchmark(images=7_500, classes="imagenet_a"),
    "imagenet-r": Benchmark(images=30_000, classes="imagenet_r"),
    "imagenet-sketch": Benchmark(images=50_889),
    "imagenet-c": Benchmark(images=75 * 50_000),
    "imagenet-real": Benchmark(images=46_837),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images that get a figure of their own: all of a set, or one corruption at one severity."""

    name: str
    open: Callable[[], Source]


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """A test set that was found to be in order.

    `among` are the classes that predictions are made among, in whose terms labels are given; None
    is all of the model's. `answers` bool [n, classes] says which classes are right for each image
    where that may be several. The parts of a `corrupted` set are ImageNet-C's. `whole` is how many
    images a complete copy has.
    """

    __test__ = False  # it is no test, whatever pytest thinks of its name

    name: str
    path: str
    parts: tuple[Part, ...]
    among: tuple[int, ...] | None = None
    answers: NDArray[np.bool_] | None = None
    corrupted: bool = False
    whole: int | None = None


class Relabelled:
    """The samples `ids` of a source under other `labels`, int64 [n] both: a `Source` itself."""

    def __init__(self, source: Source, ids: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self.labels = labels
        self.classes = source.classes
        self.shard_sizes = np.array([len(ids)], np.int64)
        self.fingerprint = "evaluation"  # no cursor outlives it, so there is nothing to tell apart
        self._source = source
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def expect(self, next_use: NDArray[np.int64]) -> None:
        """Nothing is foretold in an evaluation."""

    def prefetch(self, ids: Sequence[int]) -> None:
        """See `Source`."""
        self._source.prefetch(self._ids[list(ids)].tolist())

    def read(self, id: int) -> Sample:
        """See `Source`."""
        return replace(self._source.read(int(self._ids[id])), id=id, label=int(self.labels[id]))

    def close(self) -> None:
        """See `Source`."""
        self._source.close()

    def name(self, id: int) -> str:
        """See `Source`."""
        return self._source.name(int(self._ids[id]))


def find(specs: Sequence[str], *, num_classes: int) -> list[TestSet]:
    """Return the test sets that `specs`, each NAME=PATH, mean to a model of so many classes.

    Raises:
        UserError: for a name that is misspelt or given twice, a path that is not laid out as the
            set is published, and classes that the set or the model does not have.
        DataError: if images or shards cannot be read.
    """
    found: dict[str, TestSet] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not (name and equals and path):
            raise UserError(f"--data {spec}: give NAME=PATH, such as imagenet=/data/imagenet/val")
        if name in found:
            raise UserError(f"--data {name} is given twice: give every set a name of its own")
        _check_name(name)
        path = expanduser(path)  # a shell leaves ~ alone behind an equals sign
        if "://" not in path and not Path(path).is_dir():
            raise UserError(f"--data {name}: {path} is no folder: name the one that holds the set")
        if name in BENCHMARKS:
            found[name] = _published(name, path, num_classes)
        else:
            found[name] = _own(name, path, num_classes)
    return list(found.values())


def _check_name(name: str) -> None:
    """Raise UserError for what is probably a published set's name, misspelt: it has other rules."""
    if name in BENCHMARKS:
        return
    spellings = (name.lower(), f"imagenet-{name.lower()}")
    near = [x for word in spellings for x in get_close_matches(word, BENCHMARKS, cutoff=_ALIKE)]
    if near:
        raise UserError(
            f"--data {name} is no published set that is known here; did you mean {near[0]}? "
            f"(known: {', '.join(BENCHMARKS)}; a set of your own needs a name less alike)"
        )


def _published(name: str, path: str, num_classes: int) -> TestSet:
    synsets = _lines("imagenet_synsets")
    if num_classes != len(synsets):
        raise UserError(
            f"--data {name} needs a model of ImageNet-1k's {len(synsets)} classes, and this one "
            f"has {num_classes}: evaluate it on data of its own, --data NAME=PATH"
        )
    index = {synset: number for number, synset in enumerate(synsets)}
    benchmark = BENCHMARKS[name]
    found = partial(TestSet, name=name, path=path, whole=benchmark.images)
    match name:
        case "imagenet-c":
            return found(parts=_corrupted(path, index), corrupted=True)
        case "imagenet-real":
            return _reassessed(found, path, index)
        case "imagenet-v2":
            index = {str(number): number for number in range(num_classes)}
    among = None
    if benchmark.classes is not None:
        listed = _lines(f"{benchmark.classes}_synsets")
        among = tuple(index[synset] for synset in listed)
        index = {synset: place for place, synset in enumerate(listed)}
    source = _labelled(name, path, index)
    return found(parts=(Part(name=name, open=lambda: source),), among=among)


def _own(name: str, path: str, num_classes: int) -> TestSet:
    """A set whose classes are the model's, in the order in which a run would see them."""
    source = _open(path)
    if len(source.classes) != num_classes:
        raise UserError(
            f"--data {name}: {path} has {len(source.classes)} classes and the model {num_classes}: "
            f"give a set of the model's classes, or a published one by its name "
            f"({', '.join(BENCHMARKS)})"
        )
    every = Relabelled(source, np.arange(len(source)), source.labels)
    return TestSet(name=name, path=path, parts=(Part(name=name, open=lambda: every),))


def _open(path: str) -> Source:
    shards = "://" in path or (Path(path) / _MANIFEST).exists()
    return open_source("webdataset" if shards else "folder", path)


def _labelled(name: str, path: str, index: Mapping[str, int]) -> Relabelled:
    """Open a set whose class names `index` turns into labels."""
    source = _open(path)
    _check_classes(name, path, source.classes, index)
    labels = np.array([index[label] for label in source.classes], np.int64)[source.labels]
    return Relabelled(source, np.arange(len(source)), labels)


def _check_classes(name: str, path: str, classes: Sequence[str], index: Mapping[str, int]) -> None:
    unknown = [folder for folder in classes if folder not in index]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise UserError(
            f"--data {name}: {path} holds {', '.join(unknown[:_SHOWN])}{more}, not of the "
            f"{len(index)} classes of {name}: each folder there is called by its "
            f"{BENCHMARKS[name].folder}"
        )


def _corrupted(path: str, index: Mapping[str, int]) -> tuple[Part, ...]:
    """The parts of ImageNet-C, PATH/CORRUPTION/SEVERITY/CLASS, opened when their turn comes.

    All of them together are 3.75 million files, which nobody wants listed in advance.
    """
    places = [(kind, severity) for kind in ALEXNET_ERRORS for severity in SEVERITIES]
    folders = {f"{kind}/{severity}": Path(path) / kind / str(severity) for kind, severity in places}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise UserError(
            f"--data imagenet-c: {path} lacks {len(missing)} of its {len(folders)} folders "
            f"CORRUPTION/SEVERITY, such as {missing[0]}: the mean corruption error is that of all"
        )
    for folder in folders.values():
        folders_below = (entry.name for entry in folder.iterdir() if entry.is_dir())
        classes = sorted(name for name in folders_below if not name.startswith("."))
        _check_classes("imagenet-c", str(folder), classes, index)
    return tuple(
        Part(name=name, open=partial(_labelled, "imagenet-c", str(folder), index))
        for name, folder in folders.items()
    )


def _reassessed(found: Callable[..., TestSet], path: str, index: Mapping[str, int]) -> TestSet:
    """ImageNet-1k's evaluation images under the labels of ReaL (Beyer et al., arXiv 2006.07159).

    Images that got no label at all are left out, as there.
    """
    right = _real_labels(Path(path))
    source = _open(path)
    _check_classes("imagenet-real", path, source.classes, index)
    ids, rows = [], []
    for id in range(len(source)):
        number = _VAL_NUMBER.search(source.name(id))
        if number is None or not 1 <= int(number[1]) <= len(right):
            raise UserError(
                f"--data imagenet-real: {source.name(id)} is not called as ImageNet's files are, "
                f"ILSVRC2012_val_00000001 to {len(right):08d}, by which ReaL counts: give the "
                "folder of its evaluation images"
            )
        if right[int(number[1]) - 1]:
            ids.append(id)
            rows.append(right[int(number[1]) - 1])
    if not ids:
        raise UserError(f"--data imagenet-real: none of the {len(source)} images has a label there")
    answers = np.zeros((len(ids), len(index)), np.bool_)
    for row, labels in enumerate(rows):
        answers[row, labels] = True
    kept = Relabelled(source, np.array(ids, np.int64), answers.argmax(axis=1))
    return found(parts=(Part(name="imagenet-real", open=lambda: kept),), answers=answers)


def _real_labels(folder: Path) -> list[list[int]]:
    """Read real.json, in the folder of the images or beside it, else the copy in timm."""
    own = [place for place in (folder / "real.json", folder.parent / "real.json") if place.exists()]
    path = own[0] if own else _info() / "imagenet_real_labels.json"
    try:
        labels: list[list[int]] = json.loads(path.read_text())
        fits = all(0 <= label < 1000 for row in labels for label in row)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not ReaL's list of labels ({error}): fetch it again") from None
    if not fits:
        raise UserError(f"{path} names labels beyond 0 to 999: it is not ReaL's list of labels")
    return labels


@cache
def _lines(name: str) -> tuple[str, ...]:
    return tuple((_info() / f"{name}.txt").read_text().split())


def _info() -> Path:
    """The folder in which timm keeps the lists of classes."""
    spec = find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the published sets need the lists of classes that timm brings along, and it is not "
            "installed: pip install timm"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "_info"
