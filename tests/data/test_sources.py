"""Sources that need no shards, and opening one by its kind."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from data.base import DataError
from data.decode import Geometry, decode
from data.folder import ArraySource, FolderSource, SyntheticSource, encode_png
from data.pipeline import open_source


@pytest.fixture
def image_folder(tmp_path):
    """Three classes of two, one and two images; files that are no images are ignored."""
    for name in ("cat/2.png", "cat/10.png", "ant/x.PNG", "bee/sub/y.png", "bee/z.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.full((4, 5, 3), len(name), np.uint8)))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "stray.png").write_bytes(b"")
    (tmp_path / ".hidden").mkdir()
    for name in (".hidden/x.png", "cat/._2.png"):
        (tmp_path / name).write_bytes(b"not an image either")
    return tmp_path


def test_an_image_folder_is_sorted_by_class_and_name(image_folder):
    source = open_source("folder", image_folder)
    names = [source.name(id).removeprefix(f"{image_folder}/") for id in range(len(source))]
    assert names == ["ant/x.PNG", "bee/sub/y.png", "bee/z.png", "cat/10.png", "cat/2.png"]
    assert source.classes == ("ant", "bee", "cat")
    assert source.labels.tolist() == [0, 1, 1, 2, 2]
    assert source.read(3).image == (image_folder / "cat/10.png").read_bytes()
    assert source.read(3).label == 2


def test_the_folder_fingerprint_sees_names_and_sizes(image_folder):
    before = FolderSource(image_folder).fingerprint
    assert FolderSource(image_folder).fingerprint == before
    (image_folder / "cat/2.png").rename(image_folder / "cat/3.png")
    renamed = FolderSource(image_folder).fingerprint
    with (image_folder / "cat/3.png").open("ab") as file:
        file.write(b"\0")
    assert len({before, renamed, FolderSource(image_folder).fingerprint}) == 3


def test_a_file_that_vanished_is_named(image_folder):
    source = FolderSource(image_folder)
    (image_folder / "ant/x.PNG").unlink()
    with pytest.raises(DataError, match=r"ant/x\.PNG cannot be read"):
        source.read(0)


@pytest.mark.parametrize("denied", ["", "bee", "bee/sub"])
def test_a_folder_that_may_not_be_read_is_named(image_folder, monkeypatch, denied):
    scandir, listdir = os.scandir, os.listdir

    def refusing(look):
        def refuse(path):
            if Path(path) == image_folder / denied:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return look(path)

        return refuse

    monkeypatch.setattr(os, "scandir", refusing(scandir))
    monkeypatch.setattr(os, "listdir", refusing(listdir))
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)") as error:
        FolderSource(image_folder)
    assert str(image_folder / denied) in str(error.value)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no CLASS"):
        FolderSource(tmp_path)
    with pytest.raises(DataError, match="nowhere is no folder"):
        FolderSource(tmp_path / "nowhere")


def test_synthetic_samples_depend_on_their_number_alone():
    source = open_source("synthetic", "num_samples=40,num_classes=4,size=16")
    again = SyntheticSource(num_samples=40, num_classes=4, size=16)
    assert source.fingerprint == again.fingerprint
    assert source.fingerprint != SyntheticSource(num_samples=41, num_classes=4, size=16).fingerprint
    assert [source.read(id) for id in (7, 3)] == [again.read(id) for id in (7, 3)]
    assert len({source.read(id).image for id in range(40)}) == 40
    pixels = decode(source.read(5).image, lambda width, height: Geometry(None, (width, height)))
    assert pixels.shape == (16, 16, 3)
    assert source.read(5).label == source.labels[5] == 1


def test_arrays_come_back_pixel_by_pixel():
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), np.uint8)
    source = ArraySource(images=images, labels=np.array([1, 0, 1]), classes=("a", "b"))
    for id in range(3):
        pixels = decode(
            source.read(id).image, lambda width, height: Geometry(None, (width, height))
        )
        assert np.array_equal(pixels, images[id])
    other = ArraySource(images=images, labels=np.array([1, 0, 0]), classes=("a", "b"))
    assert source.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("tfrecord", "x", "'tfrecord' is not one of webdataset, ffcv, folder, synthetic"),
        ("synthetic", "samples=3", "'samples=3' is not <name>=<number>"),
        ("synthetic", "size=big", "'size=big' is not <name>=<number>"),
        ("webdataset", "nowhere", "nowhere/manifest.json is missing: there is no folder"),
    ],
)
def test_unknown_kinds_and_parameters_are_refused(kind, path, message):
    with pytest.raises(DataError, match=message):
        open_source(kind, path)
