"""Packing: whole or not at all, once, and readable by webdataset itself."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import webdataset

from data.base import DataError
from data.build import build
from data.folder import FolderSource, SyntheticSource
from data.index import Manifest
from data.pack import pack, pack_folder
from data.webdataset import TarSource

ROOT = Path(__file__).parents[2]
SOURCE = SyntheticSource(num_samples=50, num_classes=5, size=8)


def quiet(_):
    pass


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_sample_is_packed_once_and_shuffled(tmp_path):
    manifest = pack(SOURCE, tmp_path / "out", samples_per_shard=20, progress=quiet)
    packed = TarSource(tmp_path / "out")
    assert [shard.num_samples for shard in manifest.shards] == [17, 17, 16]
    assert [shard.name for shard in manifest.shards] == [f"out-00000{i}.tar" for i in range(3)]
    assert packed.classes == SOURCE.classes
    found = [(packed.read(id).image, packed.read(id).label) for id in range(50)]
    expected = [(SOURCE.read(id).image, SOURCE.read(id).label) for id in range(50)]
    assert sorted(found) == sorted(expected)
    assert found != expected
    assert all(shard.class_entropy > 1.9 for shard in manifest.shards)


def test_webdataset_reads_what_was_packed(tmp_path):
    pack(SOURCE, tmp_path / "out", progress=quiet)
    packed = TarSource(tmp_path / "out")
    url = str(tmp_path / "out" / "out-000000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{id:09d}" for id in range(50)]
    assert [sample["png"] for sample in samples] == [packed.read(id).image for id in range(50)]
    assert [int(sample["cls"]) for sample in samples] == packed.labels.tolist()


def test_packing_again_gives_the_same_bytes_and_a_finished_pack_is_left_alone(tmp_path):
    pack(SOURCE, tmp_path / "a" / "x", progress=quiet)
    pack(SOURCE, tmp_path / "b" / "x", progress=quiet)
    assert contents(tmp_path / "a" / "x") == contents(tmp_path / "b" / "x")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "x").iterdir()}
    lines = []
    pack(SOURCE, tmp_path / "a" / "x", progress=lines.append)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "x").iterdir()} == before
    assert lines == [f"{tmp_path / 'a' / 'x' / 'manifest.json'} is there already"]


def test_another_seed_is_another_order(tmp_path):
    first = pack(SOURCE, tmp_path / "a", seed=0, progress=quiet)
    second = pack(SOURCE, tmp_path / "b", seed=1, progress=quiet)
    assert first.fingerprint != second.fingerprint


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    pack(SOURCE, tmp_path / "out", progress=quiet)
    with pytest.raises(DataError, match="packed from other data or with other settings"):
        pack(SOURCE, tmp_path / "out", seed=1, progress=quiet)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="mine is in the way"):
        pack(SOURCE, tmp_path / "mine", progress=quiet)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_data_set_that_does_not_say_what_it_was_packed_from_is_refused(tmp_path, content):
    pack(SOURCE, tmp_path / "out", progress=quiet)
    (tmp_path / "out" / "pack.json").unlink()
    if content is not None:
        (tmp_path / "out" / "pack.json").write_text(content)
    with pytest.raises(DataError, match="packed from other data or with other settings"):
        pack(SOURCE, tmp_path / "out", progress=quiet)


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is the current folder"):
        pack(SOURCE, Path("."), progress=quiet)


def test_a_finished_pack_that_lost_a_shard_is_not_taken_for_whole(tmp_path):
    pack(SOURCE, tmp_path / "out", samples_per_shard=20, progress=quiet)
    (tmp_path / "out" / "out-000001.tar").unlink()
    with pytest.raises(DataError, match=r"out-000001\.tar is missing"):
        pack(SOURCE, tmp_path / "out", samples_per_shard=20, progress=quiet)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"a/3\.png cannot be read"), (b"GIF89a", r"a/3\.png is neither JPEG nor PNG")],
)
@pytest.mark.parametrize("settings", [{}, {"format": "beton"}], ids=["tar", "beton"])
def test_a_bad_sample_is_named_and_no_output_left(tmp_path, content, message, settings):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for id in range(6):
        (tmp_path / "images" / "a" / f"{id}.png").write_bytes(SOURCE.read(id).image)
    source = FolderSource(tmp_path / "images")
    bad = tmp_path / "images" / "a" / "3.png"
    bad.unlink()
    if content is not None:
        bad.write_bytes(content)
        source = FolderSource(tmp_path / "images")
    with pytest.raises(DataError, match=message):
        pack(source, tmp_path / "out", progress=quiet, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@contextmanager
def another_process_packing(out):
    """Another process in the midst of packing fifty samples of size 9 into `out`."""
    program = (
        "import sys; from pathlib import Path; from data.pack import pack;"
        "from data.folder import SyntheticSource;"
        "source = SyntheticSource(num_samples=50, num_classes=5, size=9);"
        "report = lambda line: (print(line, flush=True), sys.stdin.readline());"
        "pack(source, Path(sys.argv[1]), samples_per_shard=10, progress=report)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("wrote ")
        yield process


def test_a_killed_pack_of_something_else_is_removed_by_the_next(tmp_path):
    out = tmp_path / "out"
    with another_process_packing(out) as process:
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    (tmp_path / "2147483647").mkdir()  # a folder of the user's, named like a process
    pack(SOURCE, out, progress=quiet)
    assert len(TarSource(out)) == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2147483647", "out"]


PHOTOS = SyntheticSource(num_samples=120, num_classes=5, size=120)
PROGRAM = """
import sys
from pathlib import Path
from data.folder import SyntheticSource
from data.pack import pack
if __name__ == "__main__":
    source = SyntheticSource(num_samples=120, num_classes=5, size=120)
    pack(source, Path(sys.argv[1]), format=sys.argv[2], samples_per_shard=4, workers=2)
"""


@pytest.mark.parametrize("format", ["tar", "beton"])
def test_a_pack_killed_at_any_time_goes_on_to_the_same_bytes(tmp_path, format):
    def settings(**more):
        return {"format": format, "samples_per_shard": 4, "progress": quiet, **more}

    pack(PHOTOS, tmp_path / "serial" / "out", **settings())
    out = tmp_path / "killed" / "out"
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    finished = []
    for enough in (3, 12):
        with subprocess.Popen(
            [sys.executable, str(script), str(out), format],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            while len(finished) < enough:
                time.sleep(0.005)
                finished = list(tmp_path.glob("killed/.out.part-*/out-*[rs]"))
            process.send_signal(signal.SIGKILL)
        assert not out.exists()
        deadline = time.monotonic() + 20
        while still_running(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not still_running(process.pid)
    before = {path.name: path.stat().st_mtime_ns for path in finished}
    lines = []
    pack(PHOTOS, out, **settings(progress=lines.append))
    assert lines[0].startswith("continuing after ")
    assert contents(out) == contents(tmp_path / "serial" / "out")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["out"]
    if format == "tar":
        assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert len(TarSource(out)) == 120


def still_running(session):
    """Whether a worker of a killed pack is alive."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


@pytest.mark.parametrize("format", ["tar", "beton"])
def test_many_processes_write_what_one_does(tmp_path, format):
    pack(PHOTOS, tmp_path / "tars", samples_per_shard=50, progress=quiet)
    source = TarSource(tmp_path / "tars")
    for workers in (1, 3):
        pack(
            source,
            tmp_path / str(workers) / "out",
            format=format,
            samples_per_shard=25,
            workers=workers,
            progress=quiet,
        )
    assert contents(tmp_path / "3" / "out") == contents(tmp_path / "1" / "out")


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    out, lines, rename = tmp_path / "out", [], Path.rename

    def full(self, target):
        if self.name.startswith("out-000001.tar"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    message = r"no space left for .*out \(No space left on device\); free some and run this again"
    with pytest.raises(DataError, match=message):
        pack(SOURCE, out, samples_per_shard=20, progress=lines.append)
    monkeypatch.undo()
    assert not out.exists()
    assert "what is finished is kept in" in lines[-1]
    pack(SOURCE, out, samples_per_shard=20, progress=lines.append)
    assert "continuing after 17 of 50 samples" in lines
    pack(SOURCE, tmp_path / "other" / "out", samples_per_shard=20, progress=quiet)
    assert contents(out) == contents(tmp_path / "other" / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "tfrecord"}, "format 'tfrecord' is not one of tar, beton"),
        ({"format": "beton", "image_mode": "webp"}, "image_mode 'webp' is not one of jpg, raw"),
        ({"samples_per_shard": 0}, "samples_per_shard 0 must be at least 1"),
        ({"workers": 0}, "workers 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        pack(SOURCE, tmp_path / "out", progress=quiet, **settings)
    assert list(tmp_path.iterdir()) == []


def test_two_packs_into_one_folder_leave_each_other_alone(tmp_path):
    out = tmp_path / "out"
    with another_process_packing(out) as process:
        manifest = pack(SOURCE, out, progress=quiet)
        _, error = process.communicate("\n" * 50)
    assert "packed from other data" in error
    assert Manifest.load(out) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    same = tmp_path / "same"
    with another_process_packing(same) as process:
        pack(
            SyntheticSource(num_samples=50, num_classes=5, size=9),
            same,
            samples_per_shard=10,
            progress=quiet,
        )
        assert process.communicate("\n" * 50)[1] == ""
    assert len(TarSource(same)) == 50


def test_an_image_folder_keeps_its_splits_and_class_names(tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for id in range(count):
            path = tmp_path / "images" / split / f"class_{id % 3}" / f"{id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(SOURCE.read(id).image)
    folders = pack_folder(tmp_path / "images", tmp_path / "out", progress=quiet)
    assert folders == [tmp_path / "out" / "train", tmp_path / "out" / "val"]
    assert [len(TarSource(folder)) for folder in folders] == [6, 3]
    assert TarSource(folders[1]).classes == ("class_0", "class_1", "class_2")
    (flat,) = pack_folder(tmp_path / "images" / "train", tmp_path / "flat", progress=quiet)
    assert len(TarSource(flat)) == 6


def write_captioned(folder, *, keys):
    """A tar for each list of keys, of samples with a caption, what is known, and a depth map."""
    folder.mkdir()
    for number, names in enumerate(keys):
        with webdataset.TarWriter(str(folder / f"{number}.tar"), encoder=False) as writer:
            for place, name in enumerate(names):
                fields = {"caption": f"{number} {place}", "label": place % 5}
                writer.write(
                    {
                        "__key__": name,
                        "png": SOURCE.read(10 * number + place).image,
                        "txt": fields["caption"].encode(),
                        "json": json.dumps(fields).encode(),
                        "depth.png": b"depth",
                        "mask.npy.gz": b"\x1f\x8b",
                    }
                )
    build(folder, classes=["a", "b", "c", "d", "e"], progress=quiet)


def read_captioned(folder):
    """Everything in the tars of a folder, by name."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}


def test_names_captions_and_further_members_go_from_tar_to_tar(tmp_path):
    keys = [[f"{number}/ümlaut {place}" for place in range(6)] for number in range(2)]
    write_captioned(tmp_path / "set", keys=keys)
    before = read_captioned(tmp_path / "set")
    (out,) = pack_folder(tmp_path / "set", tmp_path / "out", samples_per_shard=5, progress=quiet)
    after = read_captioned(out)
    assert sorted(after) == sorted(before) == sorted(keys[0] + keys[1])
    for name, sample in after.items():
        for suffix in ("png", "txt", "json", "depth.png", "mask.npy.gz"):
            assert sample[suffix] == before[name][suffix], suffix
        assert int(sample["cls"]) == json.loads(sample["json"])["label"]
    assert TarSource(out).classes == ("a", "b", "c", "d", "e")
    (again,) = pack_folder(out, tmp_path / "again", progress=quiet)
    assert {name: sample["txt"] for name, sample in read_captioned(again).items()} == {
        name: sample["txt"] for name, sample in before.items()
    }


def test_samples_of_one_name_in_several_shards_are_numbered(tmp_path):
    write_captioned(tmp_path / "set", keys=[["x", "y"], ["x", "y"]])
    lines = []
    (out,) = pack_folder(tmp_path / "set", tmp_path / "out", progress=lines.append)
    after = read_captioned(out)
    assert sorted(after) == [f"{number:09d}" for number in range(4)]
    assert {sample["txt"] for sample in after.values()} == {b"0 0", b"0 1", b"1 0", b"1 1"}
    assert any("several samples have the same name" in line for line in lines)


def test_what_a_beton_cannot_hold_is_said(tmp_path):
    write_captioned(tmp_path / "set", keys=[["x", "y"]])
    lines = []
    pack_folder(tmp_path / "set", tmp_path / "beton", format="beton", progress=lines.append)
    assert any("names and other members stay behind" in line for line in lines)
    (tars,) = pack_folder(tmp_path / "beton", tmp_path / "tars", progress=quiet)
    assert sorted(read_captioned(tars)) == ["000000000", "000000001"]
    assert TarSource(tars).classes == ("a", "b", "c", "d", "e")
