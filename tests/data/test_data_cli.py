"""The data commands as a user runs them: what they print, and how they fail."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.__main__ import main
from data.folder import SyntheticSource
from data.webdataset import TarSource

ROOT = Path(__file__).parents[2]
IMAGES = SyntheticSource(num_samples=12, num_classes=3, size=8)


@pytest.fixture
def images(tmp_path):
    for id in range(12):
        path = tmp_path / "images" / f"kind_{id % 3}" / f"{id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGES.read(id).image)
    return tmp_path / "images"


def test_pack_verify_and_index_from_end_to_end(images, tmp_path, capsys):
    out = tmp_path / "shards"
    assert main(["pack", str(images), "--out", str(out), "--samples-per-shard", "5"]) == 0
    assert str(out / "manifest.json") in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    fingerprint = TarSource(out).fingerprint
    assert f"12 samples, fingerprint {fingerprint}" in capsys.readouterr().out

    (out / "shards-000001.idx").unlink()
    assert main(["verify", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: {out / 'shards-000001.idx'} is missing; run `foveate data index {out}`\n"
    )
    assert main(["index", str(out)]) == 0
    assert TarSource(out).fingerprint == fingerprint
    assert TarSource(out).classes == ("kind_0", "kind_1", "kind_2")


def test_class_names_come_from_a_file_when_asked(images, tmp_path):
    out = tmp_path / "shards"
    assert main(["pack", str(images), "--out", str(out)]) == 0
    (tmp_path / "names.txt").write_text("ant\nbee\n\ncat\n")
    assert main(["index", str(out), "--classes", str(tmp_path / "names.txt")]) == 0
    assert TarSource(out).classes == ("ant", "bee", "cat")


def test_an_indexed_set_becomes_a_beton_that_runs_can_change_to(images, tmp_path, capsys):
    tars, beton = tmp_path / "tars", tmp_path / "beton"
    assert main(["pack", str(images), "--out", str(tars), "--samples-per-shard", "5"]) == 0
    options = ["--format", "beton", "--image-mode", "raw", "--workers", "2"]
    assert main(["pack", str(tars), "--out", str(beton), *options]) == 0
    assert f"packed 12 samples into 1 shards: {beton / 'manifest.json'}" in capsys.readouterr().out
    assert TarSource(beton).fingerprint == TarSource(tars).fingerprint
    assert main(["verify", str(beton), "--workers", "1"]) == 0
    assert main(["index", str(beton)]) == 0
    assert TarSource(beton).fingerprint == TarSource(tars).fingerprint


def test_an_index_may_stand_apart_and_be_of_headers_alone(images, tmp_path, capsys):
    tars, far = tmp_path / "tars", tmp_path / "far"
    assert main(["pack", str(images), "--out", str(tars)]) == 0
    assert main(["index", str(tars), "--out", str(far), "--headers-only"]) == 0
    shown = capsys.readouterr().out
    assert "NOTE: of the images only headers were read" in shown
    assert str(far / "manifest.json") in shown
    assert main(["index", str(tars), "--label-field", "category"]) == 2
    assert "no number in .json (fields category)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("index", "{}/nowhere"),
        ("index", "memory://nowhere", "--out", "{}/out"),
        ("verify", "{}/images", "--workers", "0"),
        ("index", "{}/images", "--workers", "0"),
        ("pack", "{}/images", "--out", "{}/out", "--workers", "0"),
        ("pack", "{}/nowhere", "--out", "{}/out"),
        ("pack", "{}/images", "--out", "{}/images"),
        ("pack", "{}/images", "--out", "{}/out", "--samples-per-shard", "0"),
        ("pack", "{}/images", "--out", "/proc/nothing/out"),
        ("index", "{}/images", "--classes", "{}/nowhere"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(images, tmp_path, arguments, capsys):
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_line_exits_with_the_code_and_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "data", "verify", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {tmp_path / 'manifest.json'} is missing; run `foveate data index {tmp_path}`\n"
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_keeps_what_is_finished(images, tmp_path, workers):
    command = [sys.executable, "-m", "data", "pack", str(images), "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [*command, "--samples-per-shard", "1", "--workers", workers],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        shown, error = process.communicate()
    if process.returncode == 0:
        pytest.skip("it was done already")
    assert (process.returncode, error) == (130, "")
    assert "what is finished is kept in" in shown


def test_a_set_within_what_it_is_made_from_is_refused(images, tmp_path, capsys):
    assert main(["pack", str(images), "--out", str(images / "packed")]) == 2
    assert "would be a part" in capsys.readouterr().err
    (tmp_path / "both").mkdir()
    images.rename(tmp_path / "both" / "train")
    assert main(["pack", str(tmp_path / "both"), "--out", str(tmp_path / "both" / "packed")]) == 0
    assert len(TarSource(tmp_path / "both" / "packed" / "train").classes) == 3


def test_class_names_in_no_text_are_refused(images, tmp_path, capsys):
    out = tmp_path / "shards"
    assert main(["pack", str(images), "--out", str(out)]) == 0
    picture = next(out.glob("*.tar"))
    picture.write_bytes(b"\xff" + picture.read_bytes())
    assert main(["index", str(out), "--classes", str(picture)]) == 2
    assert "is no text in UTF-8" in capsys.readouterr().err


def test_a_full_disk_is_named_while_indexing(images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shards"
    assert main(["pack", str(images), "--out", str(out)]) == 0
    next(out.glob("*.idx")).unlink()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["index", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: there is no space left for {out} (No space left on device)")
