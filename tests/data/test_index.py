"""Indexing tars of any make, and naming the shard that changed."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data.base import DataError, Sample
from data.build import build
from data.folder import SyntheticSource, encode_png
from data.index import Manifest, check_index, verify
from data.pack import pack
from data.webdataset import TarSource

ROOT = Path(__file__).parents[2]
IMAGES = SyntheticSource(num_samples=12, num_classes=3, size=8)


def samples(count=12):
    return [(f"{id:04d}", IMAGES.read(id)) for id in range(count)]


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path, *, format=tarfile.GNU_FORMAT, prefix="", count=12):
    with tarfile.open(path, "w", format=format) as archive:
        for key, sample in samples(count):
            add(archive, f"{prefix}{key}.cls", str(sample.label).encode())
            add(archive, f"{prefix}{key}.png", sample.image)
            add(archive, f"{prefix}{key}.json", b"{}")


def by_tarfile(format, prefix=""):
    return lambda path: write_tar(path, format=format, prefix=prefix)


def by_webdataset(path):
    with webdataset.TarWriter(str(path)) as writer:
        for key, sample in samples():
            writer.write({"__key__": key, "png": sample.image, "cls": sample.label})


LONG = "a_folder_with_a_rather_long_name/" * 8 + "ümlaut/"  # beyond the 100 bytes of a header


@pytest.mark.parametrize(
    "write",
    [
        by_tarfile(tarfile.USTAR_FORMAT),
        by_tarfile(tarfile.GNU_FORMAT, LONG),
        by_tarfile(tarfile.PAX_FORMAT, LONG),
        by_tarfile(tarfile.PAX_FORMAT, "./"),
        by_webdataset,
    ],
    ids=["ustar", "gnu", "pax", "dot", "webdataset"],
)
def test_samples_of_any_writer_are_read_back(tmp_path, write):
    write(tmp_path / "a.tar")
    build(tmp_path, progress=lambda _: None)
    source = TarSource(tmp_path)
    assert len(source) == 12
    assert source.classes == ("0", "1", "2")
    for id, (_, expected) in enumerate(samples()):
        assert source.read(id) == expected
    assert source.labels.tolist() == IMAGES.labels.tolist()


def test_the_index_agrees_with_what_tarfile_reads(tmp_path):
    write_tar(tmp_path / "a.tar", format=tarfile.PAX_FORMAT, prefix=LONG)
    build(tmp_path, progress=lambda _: None)
    source = TarSource(tmp_path)
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = [member for member in archive if member.name.endswith(".png")]
        for id, member in enumerate(members):
            assert source.read(id).image == archive.extractfile(member).read()


def test_samples_are_numbered_shard_after_shard(tmp_path):
    write_tar(tmp_path / "b.tar", count=5)
    write_tar(tmp_path / "a.tar", count=3)
    manifest = build(tmp_path, classes=["x", "y", "z"], progress=lambda _: None)
    source = TarSource(tmp_path)
    assert [shard.name for shard in manifest.shards] == ["a.tar", "b.tar"]
    assert source.classes == ("x", "y", "z")
    assert len(source) == manifest.num_samples == 8
    assert source.read(3).image == IMAGES.read(0).image
    assert source.read(3).id == 3
    assert source.name(7) == f"{tmp_path / 'b.tar'}:0004.png (sample 7)"
    assert manifest.shards[0].class_entropy == pytest.approx(np.log2(3), abs=1e-4)


@pytest.fixture
def shards(tmp_path):
    """Two shards, indexed."""
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name)
    build(tmp_path, progress=lambda _: None)
    return tmp_path


def flip_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def refusal(folder):
    with pytest.raises(DataError) as error:
        TarSource(folder)
    return str(error.value)


def test_a_truncated_shard_is_named_when_opened(shards):
    content = (shards / "b.tar").read_bytes()
    (shards / "b.tar").write_bytes(content[:-100])
    message = refusal(shards)
    assert f"{shards / 'b.tar'} is truncated" in message
    assert f"{len(content) - 100} bytes instead of {len(content)}" in message
    assert "restore the shard" in message


def test_a_missing_or_renamed_shard_is_named_when_opened(shards):
    (shards / "b.tar").rename(shards / "c.tar")
    message = refusal(shards)
    assert f"{shards / 'b.tar'} is missing" in message
    assert f"foveate data index {shards}" in message


def test_an_altered_sample_is_named_when_read_and_by_verify(shards):
    source = TarSource(shards)
    offset = (shards / "b.tar").read_bytes().index(source.read(15).image)
    flip_byte(shards / "b.tar", offset + 20)
    source = TarSource(shards)
    assert source.read(14) == Sample(id=14, image=IMAGES.read(2).image, label=2)
    with pytest.raises(DataError, match=re.escape(f"{shards / 'b.tar'}:0003.png (sample 15) has")):
        source.read(15)
    with pytest.raises(DataError, match=r"b\.tar was altered"):
        verify(shards, progress=lambda _: None)


def test_a_shard_that_vanished_is_named_when_read(shards):
    source = TarSource(shards)
    (shards / "b.tar").unlink()
    with pytest.raises(DataError, match=r"b\.tar cannot be read .*restore it"):
        source.read(15)


def test_more_shards_than_a_process_may_open_are_read_by_many_threads(tmp_path):
    images = SyntheticSource(num_samples=200, size=8)
    pack(images, tmp_path / "set", samples_per_shard=1, progress=lambda _: None)
    program = (
        "import resource, sys; from concurrent.futures import ThreadPoolExecutor;"
        "from data.webdataset import TarSource;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "source = TarSource(sys.argv[1]); pool = ThreadPoolExecutor(8);"
        "print(len({s.image for s in pool.map(source.read, [*range(200)] * 3)}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "set")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("200\n", "")


def test_verify_lists_every_bad_shard_and_passes_good_ones(shards):
    lines = []
    assert verify(shards, progress=lines.append) == Manifest.load(shards)
    assert len(lines) == 2
    flip_byte(shards / "a.tar", 10)
    (shards / "b.tar").unlink()
    with pytest.raises(DataError, match=r"a\.tar was altered.*; .*b\.tar is missing"):
        verify(shards, progress=lambda _: None)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_a_damaged_index_is_named(shards, damage):
    index = shards / "a.idx"
    if damage == "flip":
        flip_byte(index, 100)
    elif damage == "truncate":
        index.write_bytes(index.read_bytes()[:50])
    elif damage == "remove":
        index.unlink()
    else:
        write_tar(shards / "other.tar", count=4)
        build(shards, progress=lambda _: None)
        (shards / "other.idx").replace(index)
    message = refusal(shards)
    assert str(index) in message
    assert f"run `foveate data index {shards}`" in message
    build(shards, progress=lambda _: None)
    assert TarSource(shards).read(0).image == IMAGES.read(0).image


def test_an_index_that_may_not_be_read_is_named(shards, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    manifest = Manifest.load(shards)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a\.idx cannot be read \(Permission denied\)"):
        check_index(shards, manifest.shards[0])


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 7}', '{"format": 1}', "\0"])
def test_a_bad_manifest_is_named(shards, content):
    (shards / "manifest.json").unlink()
    if content is not None:
        (shards / "manifest.json").write_text(content)
    message = refusal(shards)
    assert str(shards / "manifest.json") in message
    assert "foveate data index" in message


def test_the_fingerprint_changes_with_labels_order_and_class_names(tmp_path):
    def fingerprint(name, **settings):
        folder = tmp_path / name
        folder.mkdir()
        write_tar(folder / settings.pop("file", "a.tar"), count=settings.pop("count", 12))
        return build(folder, progress=lambda _: None, **settings).fingerprint

    base = fingerprint("base")
    assert fingerprint("same") == base
    assert fingerprint("renamed", file="b.tar") != base
    assert fingerprint("fewer", count=11) != base
    assert fingerprint("classes", classes=["x", "y", "z"]) != base
    assert json.loads((tmp_path / "base" / "manifest.json").read_text())["total"] == 12


def test_further_pictures_of_a_sample_and_hidden_files_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("x.png", "x.depth.png", "._x.png", "sub/.x.cls"):
            add(archive, name, IMAGES.read(0).image)
        add(archive, "x.cls", b"2")
        add(archive, "x.coarse.cls", b"1")
    build(tmp_path, progress=lambda _: None)
    assert TarSource(tmp_path).labels.tolist() == [2]


PAIR = [("png", IMAGES.read(0).image), ("cls", b"1")]
WIDE = encode_png(np.zeros((1, 70_000, 3), np.uint8))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.png", IMAGES.read(0).image)], "'x' lacks its class label: .*its image alone"),
        ([("x.cls", b"1")], "'x' lacks its image"),
        ([("x.cls", b"cat"), ("x.png", IMAGES.read(0).image)], r"x.cls holds b'cat'"),
        ([("x.cls", b"999999999"), ("x.png", IMAGES.read(0).image)], r"x.cls holds b'999999999'"),
        ([("x.cls", b"1"), ("x.png", WIDE)], r"x.png claims 70000 × 1 pixels"),
        ([("x.cls", b"1"), ("x.png", b"GIF89a")], r"x.png is neither JPEG nor PNG"),
        ([("x.cls", b"1"), ("x.cls", b"1")], "sample 'x' occurs twice"),
        ([("readme.txt", b"hello")], "no samples"),
        (
            [(f"{key}.{suffix}", content) for key in ("x", "y.v1") for suffix, content in PAIR],
            r"'y' lacks its image .*first dot",
        ),
    ],
)
def test_a_tar_that_is_no_data_set_is_refused(tmp_path, members, message):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for name, content in members:
            add(archive, name, content)
    with pytest.raises(DataError, match=message) as error:
        build(tmp_path, progress=lambda _: None)
    assert "bad.tar" in str(error.value)


@pytest.mark.parametrize("cut", ["in a header", "in the data", "between members", "to nothing"])
def test_a_tar_cut_anywhere_is_not_indexed(tmp_path, cut):
    path = tmp_path / "cut.tar"
    write_tar(path)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-2]
    ends = {
        "in a header": last.offset + 100,
        "in the data": last.offset_data + 10,
        "between members": last.offset,
        "to nothing": 0,
    }
    path.write_bytes(path.read_bytes()[: ends[cut]])
    with pytest.raises(DataError, match=r"cut\.tar .*again"):
        build(tmp_path, progress=lambda _: None)


def test_too_few_class_names_and_no_shards_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no \*\.tar or \*\.beton shards"):
        build(tmp_path)
    write_tar(tmp_path / "a.tar")
    with pytest.raises(DataError, match="label 2 has no name among the 2"):
        build(tmp_path, classes=["x", "y"], progress=lambda _: None)
