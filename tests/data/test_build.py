"""Building an index: near and far, side by side, and no more than is needed."""

import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import fsspec
import pytest

from data import build as build_module
from data import jpeg
from data.base import DataError
from data.build import build, scan
from data.columns import Flag
from data.index import Manifest, check_index, verify
from data.webdataset import TarSource
from tests.data.pictures import encode, photograph
from tests.data.test_index import flip_byte, write_tar
from tests.data.test_tar import archive_of, sample

ROOT = Path(__file__).parents[2]
PHOTO = photograph(300, 200)


def quiet(_):
    pass


def write_photos(path, count=4):
    images = [encode(PHOTO.rotate(30 * n), "JPEG", quality=97) for n in range(count)]
    members = [m for n, image in enumerate(images) for m in sample(n, jpg=image, cls=b"%d" % n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(archive_of(members).getvalue())


@pytest.fixture
def nested(tmp_path):
    """Shards of one name in two folders, and what is none of the set."""
    folder = tmp_path / "set"
    for name in ("b/000.tar", "a/000.tar", "a/001.tar", ".hidden/000.tar", "a/.torn.tar"):
        write_photos(folder / name, count=5 if name == "b/000.tar" else 3)
    (folder / "a" / "notes.txt").write_text("no shard")
    return folder


def contents(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_folders_of_shards_are_one_set(nested):
    manifest = build(nested, progress=quiet)
    assert [shard.name for shard in manifest.shards] == ["a/000.tar", "a/001.tar", "b/000.tar"]
    assert (nested / "b" / "000.idx").is_file()
    source = TarSource(nested)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]
    assert source.name(7) == f"{nested / 'b/000.tar'}:1.jpg (sample 7)"
    assert (source.read(7).regions is not None) == jpeg.works()
    assert verify(nested, progress=quiet) == manifest


def test_shards_whose_indexes_would_be_one_file_are_refused(nested):
    shutil.copy(nested / "a" / "000.tar", nested / "a" / "000.beton")
    with pytest.raises(DataError, match=r"a/000\.beton and a/000\.tar would have the same index"):
        build(nested)


@pytest.mark.parametrize("name", ["../a.tar", "/a.tar", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(nested, name):
    build(nested, progress=quiet)
    manifest = nested / "manifest.json"
    manifest.write_text(manifest.read_text().replace("a/000.tar", name))
    with pytest.raises(DataError, match="outside of its folder"):
        TarSource(nested)


@pytest.fixture
def scans(monkeypatch):
    """The shards that are scanned from here on."""
    names = []

    def spy(file, name, **settings):
        names.append(name)
        return scan(file, name, **settings)

    monkeypatch.setattr(build_module, "scan", spy)
    return names


def test_a_shard_is_scanned_again_only_if_it_or_the_question_changed(nested, scans):
    first = build(nested, progress=quiet)
    before = contents(nested)
    assert len(scans) == 3
    assert build(nested, progress=quiet) == first
    assert contents(nested) == before
    assert len(scans) == 3
    flip_byte(nested / "a" / "000.idx", 90)
    (nested / "a" / "001.idx").unlink()
    assert build(nested, progress=quiet) == first
    assert [name.removeprefix(f"{nested}/") for name in scans[3:]] == ["a/000.tar", "a/001.tar"]
    write_photos(nested / "b" / "000.tar", count=4)
    assert build(nested, progress=quiet).fingerprint != first.fingerprint
    assert len(scans) == 6
    with pytest.raises(DataError, match="lacks its class label"):
        build(nested, label_field="category", progress=quiet)


@pytest.mark.skipif(not jpeg.works(), reason="built without libjpeg-turbo's headers")
def test_lost_and_foreign_regions_are_made_again(nested):
    build(nested, progress=quiet)
    before = contents(nested)
    (nested / "a" / "000.roi").unlink()
    shutil.copy(nested / "a" / "001.roi", nested / "b" / "000.roi")
    with pytest.raises(DataError, match=r"b/000\.roi does not belong to its index; run"):
        verify(nested, progress=quiet)
    build(nested, progress=quiet)
    assert contents(nested) == before


def test_many_processes_write_what_one_does(nested, tmp_path):
    shutil.copytree(nested, tmp_path / "other")
    build(nested, progress=quiet)
    build(tmp_path / "other", workers=3, progress=quiet)
    assert contents(tmp_path / "other") == contents(nested)
    verify(tmp_path / "other", workers=3, progress=quiet)
    flip_byte(nested / "a" / "000.tar", 3)
    (nested / "a" / "000.idx").unlink()
    with pytest.raises(DataError, match=r"a/000\.tar is (damaged|not a whole tar)"):
        build(nested, workers=3, progress=quiet)
    with pytest.raises(DataError, match="workers 0 must be at least 1"):
        build(nested, workers=0, progress=quiet)


@pytest.fixture
def remote(nested):
    """The set below a URL."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for name, content in contents(nested).items():
        system.pipe(f"/bucket/set/{name}", content)
    yield "memory://bucket/set"
    system.store.clear()


def test_the_index_of_shards_elsewhere_is_written_here(nested, remote, tmp_path):
    near, far = build(nested, progress=quiet), tmp_path / "far"
    manifest = build(remote, out=far, progress=quiet)
    assert manifest.base == remote
    assert manifest.shards == near.shards
    assert manifest.fingerprint == near.fingerprint  # wherever they lie
    assert Manifest.load(far) == manifest
    index_files = {name for name in contents(nested) if name.endswith((".idx", ".roi"))}
    assert {name: contents(far)[name] for name in index_files} == {
        name: contents(nested)[name] for name in index_files
    }
    assert set(contents(far)) == {*index_files, "manifest.json"}
    assert verify(far, workers=2, progress=quiet) == manifest
    fsspec.filesystem("memory").pipe("/bucket/set/b/000.tar", b"x")
    with pytest.raises(DataError, match=rf"{remote}/b/000\.tar is truncated: 1 bytes instead of"):
        verify(far, progress=quiet)


def test_headers_can_be_read_alone(nested, remote, tmp_path, scans):
    near, lines = build(nested, progress=quiet), []
    scans.clear()
    manifest = build(remote, out=tmp_path / "far", headers_only=True, progress=lines.append)
    assert "no CRC and no hash of the shards" in lines[-2]
    for ours, theirs in zip(manifest.shards, near.shards, strict=True):
        assert ours.sha256 is None
        found, whole = check_index(tmp_path / "far", ours), check_index(nested, theirs)
        assert (found["flags"] == Flag.NO_CRC).all()
        for name in ("offset", "size", "label", "width", "height", "key"):
            assert (found[name] == whole[name]).all()
    assert len(scans) == 3
    assert build(remote, out=tmp_path / "far", headers_only=True, progress=quiet) == manifest
    assert len(scans) == 3  # its store says that nothing changed
    lines.clear()
    verify(tmp_path / "far", progress=lines.append)
    assert "ok" in lines[0]
    assert "indexed from headers alone" in lines[0]
    assert "no CRC and no hash" in lines[-1]
    copy = fsspec.filesystem("memory")
    copy.pipe("/bucket/set/b/000.tar", copy.cat("/bucket/set/b/000.tar"))
    build(remote, out=tmp_path / "far", headers_only=True, progress=quiet)
    assert len(scans) == 4


def test_samples_of_a_headers_only_index_are_read_unchecked(nested):
    build(nested, progress=quiet)
    build(nested, headers_only=True, progress=quiet)
    assert not list(nested.rglob("*.roi"))
    verify(nested, progress=quiet)
    source = TarSource(nested)
    content = source.read(0).image
    offset = (nested / "a" / "000.tar").read_bytes().index(content)
    flip_byte(nested / "a" / "000.tar", offset + len(content) // 2)
    assert TarSource(nested).read(0).image != content


class _Counted(io.BytesIO):
    read_bytes = 0

    def read(self, size=-1):
        content = super().read(size)
        self.read_bytes += len(content)
        return content


def test_headers_alone_are_a_small_part():
    images = [encode(PHOTO, "JPEG", quality=97)] * 20
    file = archive_of([m for n, image in enumerate(images) for m in sample(n, jpg=image, cls=b"1")])
    counted = _Counted(file.getvalue())
    scan(counted, "a.tar", headers_only=True)
    assert counted.read_bytes < 20 * (4096 + 3 * 512 + 50) + 2000
    assert len(file.getvalue()) > 10 * counted.read_bytes


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("memory://nowhere", "memory://nowhere is not there"),
        ("nosuch://bucket", "nosuch://bucket: 'nosuch' is not a protocol"),
        ("{}/nowhere", "nowhere is not there"),
    ],
)
def test_a_place_without_shards_is_named(tmp_path, location, message):
    with pytest.raises(DataError, match=message):
        build(location.format(tmp_path), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="name a folder for its index with --out"):
        build("memory://bucket/set")


def test_a_file_url_is_a_folder(nested):
    manifest = build(f"file://{nested}", progress=quiet)
    assert manifest.base is None
    assert len(TarSource(nested)) == manifest.num_samples


def test_class_names_and_flags_are_said(tmp_path):
    write_tar(tmp_path / "a.tar")
    lines = []
    build(tmp_path, progress=lines.append)
    assert lines == [
        f"indexed {tmp_path / 'a.tar'} (12 samples)",
        "of 12 images: 12 not JPEG",
        f"wrote {tmp_path / 'manifest.json'}",
    ]


def test_a_terminal_shows_a_bar(nested):
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, "-m", "data", "index", str(nested), "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    assert "3/3" in shown
    assert done.stdout == f"wrote {nested / 'manifest.json'}\n"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_index_goes_on(tmp_path, workers, scans):
    for number in range(12):
        write_photos(tmp_path / f"{number:02d}.tar", count=20)
    command = [sys.executable, "-m", "data", "index", str(tmp_path), "--workers", str(workers)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not list(tmp_path.glob("*.idx")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # its workers notice
    found = len(list(tmp_path.glob("*.idx")))
    assert not (tmp_path / "manifest.json").exists()
    build(tmp_path, progress=quiet)
    assert len(scans) <= 12 - found
    assert not list(tmp_path.glob("*.part*"))
    verify(tmp_path, progress=quiet)


@pytest.mark.parametrize("headers_only", [False, True])
def test_an_index_apart_leads_to_the_shards(nested, tmp_path, headers_only):
    near, far = build(nested, progress=quiet), tmp_path / "far"
    build(nested, out=far, headers_only=headers_only, progress=quiet)
    ours, theirs = TarSource(far), TarSource(nested)
    assert (ours.fingerprint == near.fingerprint) != headers_only
    for id in range(len(theirs)):
        assert ours.read(id).image == theirs.read(id).image
        assert ours.name(id) == theirs.name(id)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("headers_only", [False, True])
def test_an_index_apart_leads_to_shards_of_a_url(tmp_path, cached, headers_only):
    for name in ("a", "b"):
        write_photos(tmp_path / "set" / f"{name}.tar")
    build(tmp_path / "set", progress=quiet)
    far, theirs = tmp_path / "far", TarSource(tmp_path / "set")
    manifest = build(tmp_path / "set", out=far, headers_only=headers_only, progress=quiet)
    text = (far / "manifest.json").read_text()
    (far / "manifest.json").write_text(text.replace(manifest.base, f"local://{manifest.base}"))
    ours = TarSource(far, tmp_path / "cache" if cached else None)
    assert [ours.read(id).image for id in range(8)] == [theirs.read(id).image for id in range(8)]
    assert ours.name(5) == f"local://{tmp_path / 'set'}/b.tar:1.jpg (sample 5)"
    ours.close()
