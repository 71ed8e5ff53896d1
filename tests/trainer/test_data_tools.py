"""Looking at data as a run does: the contact sheet, the loader's figures, the doctor's line."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data.base import BadSample, Shard
from data.folder import SyntheticSource
from tests.trainer.runs import TINY, tiny_config
from trainer.data_tools import main
from trainer.doctor import Diagnosis
from trainer.inputs import make_mixer, make_pipeline
from trainer.show import draw_contact_sheet


def test_the_sheet_shows_what_the_first_batch_of_a_run_holds(tmp_path):
    config = tiny_config(tmp_path)
    pipeline = make_pipeline(config, torch.device("cpu"))
    stream = pipeline.batches(pipeline.start(), Shard(rank=0, world_size=1))
    images, _ = make_mixer(config)(next(stream)[0])
    stream.close()
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    pixels = (images.permute(0, 2, 3, 1) * std + mean).mul(255).round().clamp(0, 255).byte().numpy()
    sheet = np.asarray(draw_contact_sheet(config, count=4, epoch=0)[0])
    side = 112  # 16 pixels, seven times as large
    for index, (top, left) in enumerate([(6, 6), (6, 124), (138, 6), (138, 124)]):
        shown = sheet[top : top + side : 7, left : left + side : 7]
        assert np.array_equal(shown, pixels[index]), index
    later = np.asarray(draw_contact_sheet(config, count=4, epoch=1)[0])
    assert not np.array_equal(later, sheet)


def test_show_writes_a_picture(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["show", "demo", *TINY, "--out", str(out), "--images", "5"]) == 0
    assert Image.open(out).size == (360, 270)
    assert capsys.readouterr().out == f"wrote {out}: 5 images of epoch 0 as demo sees them\n"


def test_bench_prints_a_line_of_figures(capsys):
    assert main(["bench", "demo", *TINY, "--images", "64"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 48, "two of the batches of 24 that TINY has"
    assert figures["images_per_s"] > 0
    assert figures["cpu_ms_per_image"] > 0


def test_check_says_what_is_there_and_passes_over_single_bad_images(monkeypatch, capsys):
    def read(self, id):
        raise BadSample("this one is damaged")

    monkeypatch.setattr(SyntheticSource, "read", read)
    assert main(["check", "demo", *TINY]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"\d+ training and \d+ evaluation images in 10 classes\n", said)


def test_check_wants_the_classes_of_the_model(capsys):
    assert main(["check", "demo", *TINY, "--model.num-classes", "7"]) == 2
    assert "--model.num-classes 10" in capsys.readouterr().err


FEW = ("--data.train", "num_samples=5,num_classes=10,size=20")


@pytest.mark.parametrize("command", ["show", "bench", "doctor"])
def test_a_set_of_few_images_is_enough(command, tmp_path, capsys):
    more = {"show": ["--out", str(tmp_path / "x.png")], "doctor": ["--rate", "9"]}
    assert main([command, "demo", *TINY, *FEW, "--images", "16", *more.get(command, [])]) == 0
    said = capsys.readouterr().out
    if command == "show":
        assert ": 4 images of epoch 0" in said, "they are mixed in pairs"
    elif command == "bench":
        assert json.loads(said)["images"] == 16


def test_the_doctor_reads_no_image_twice_and_passes_over_bad_ones(monkeypatch, capsys):
    """What was read a moment ago would come from memory."""
    read, ids = SyntheticSource.read, []

    def spy(self, id):
        ids.append(id)
        if id % 4 == 0:
            raise BadSample("this one is damaged")
        return read(self, id)

    monkeypatch.setattr(SyntheticSource, "read", spy)
    assert main(["doctor", "demo", *TINY, "--images", "60", "--rate", "1000"]) == 0
    assert len(ids) == len(set(ids)) == 60
    assert "-bound" in capsys.readouterr().out


def test_the_doctor_measures_stages_and_model(capsys):
    assert main(["doctor", "demo", *TINY, "--images", "16"]) == 0
    line = capsys.readouterr().out
    assert re.match(r"\w+-bound: a device that takes [\d,]+ images/s needs [\d.]+ cores, ", line)


@pytest.mark.parametrize(
    ("changes", "bottleneck"),
    [
        ({"model_rate": 900.0}, "model"),
        ({"model_rate": 5000.0}, "decode"),
        ({"model_rate": 5000.0, "augment_ms": 2.0}, "augment"),
        ({"model_rate": 5000.0, "read_ms": 2.0}, "read"),
        ({"model_rate": 5000.0, "read_rate": 700.0}, "storage"),
        # It takes turns at one core, and does not wait for a disk.
        ({"model_rate": 5000.0, "read_rate": 99.0, "read_ms": 10.0}, "read"),
        ({"model_rate": 3000.0, "num_workers": 2}, "decode"),
    ],
)
def test_the_doctor_names_what_limits_a_run(changes, bottleneck):
    healthy = {
        "read_ms": 0.2,
        "decode_ms": 0.5,
        "augment_ms": 0.3,
        "read_rate": 1e5,
        "cores": 4,
        "num_workers": 8,
    }
    diagnosis = Diagnosis(**(healthy | changes))
    assert diagnosis.bottleneck == bottleneck
    if bottleneck == "decode":
        assert diagnosis.cores_needed == pytest.approx(changes["model_rate"] / 1000)
        assert str(diagnosis).startswith("decode-bound: a device that takes ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "demo", "--image", "1"], "unknown option --image"),
        (["show", "dem", "--out", "x.png"], "unknown recipe dem; did you mean demo?"),
        (["doctor", "demo", "--optim.lrr", "1"], "unknown option --optim.lrr"),
        (["bench", "demo", "--data.train", "/nowhere"], "/nowhere/manifest.json is missing"),
        (["show", "demo", *TINY, "--out", "/nowhere/x.png"], "No such file or directory"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "demo", "--rate", "0"],
        ["doctor", "demo", "--rate", "nan"],
        ["show", "demo", "--out", "x.png", "--epoch", "-1"],
        ["bench", "demo", "--images", "1"],
        ["bench", "demo", "--images", "many"],
    ],
)
def test_values_that_cannot_be_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert f"argument {arguments[-2]}: " in capsys.readouterr().err
