"""Every format, of both families: verified where only the library is that it is written for."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.augment import EvalSpec
from data.base import Sample
from data.mixing import normalize
from launcher.local import python_environment
from models.convert import save_official
from tests.trainer.environments import Environment
from tests.trainer.sharded import STEP, randomised, write_run
from trainer.config import UserError
from trainer.exports import folder
from trainer.exports.__main__ import main
from trainer.exports.folder import run_check
from trainer.exports.formats import export
from trainer.exports.source import load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PHOTO = Path(__file__).parents[1] / "data" / "photos" / "seeding.jpg"
SIZE = 32
MODELS = ("transnext_pico", "transxnet_pico")


def unchecked():
    """Leave out the process that proves an export: these tests have their own."""
    return mock.patch("trainer.exports.folder.run_check", return_value=None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of both families, whose checkpoints two processes wrote."""
    where = tmp_path_factory.mktemp("runs")
    for name in MODELS:
        model = randomised(name, size=SIZE, num_classes=10)
        write_run(where / name, model, "--model.name", name, "--model.img-size", str(SIZE))
    return where


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """Returns the folder of a run's export in a format, which is written when first asked for."""
    where = tmp_path_factory.mktemp("exports")

    def exported(name, form):
        out = where / f"{name}-{form}"
        if not out.exists():
            with unchecked():
                export(load(runs / name), out, form=form)
        return out

    return exported


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment whose packages a test chooses."""
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("packages", "forms"),
    [
        (("torch", "safetensors"), ("dense", "torch", "official")),
        (("timm",), ("timm",)),
        (("transformers", "torch"), ("timm",)),  # the same folder
        (("onnxruntime",), ("onnx",)),
    ],
    ids=lambda names: names[0],
)
def test_an_export_verifies_where_only_its_library_is(
    exports, environment, packages, forms, capsys
):
    environment.hold(*packages)
    for name in MODELS:
        for form in forms:
            out = exports(name, form)
            assert run_check(out, python=environment.python) is None
            said = capsys.readouterr().out
            assert f"verified by {packages[0]} " in said
            assert ("logits differ by" in said) == (form != "dense")
            assert "maps differ by" in said
            for path in out.iterdir():
                assert str(ROOT).encode() not in path.read_bytes(), "where it was made is private"
                assert path.stat().st_mode & 0o444 == out.stat().st_mode & 0o444, "as is the folder"


def test_graphs_take_batches_of_any_number_and_where_they_can_images_of_any_size(exports, capsys):
    for name, sizes in ((MODELS[0], ("32x32", "48x40")), (MODELS[1], ("32x32",))):
        assert run_check(exports(name, "onnx")) is None
        lines = capsys.readouterr().out.splitlines()
        seen = {line.split("images ")[1].split(":")[0] for line in lines}
        assert {shape.split("x", 2)[2] for shape in seen} == set(sizes)
        assert {shape.split("x")[0] for shape in seen} == {"1", "2", "3"}


def test_a_graph_in_onnx_runtime_is_the_model_at_sizes_that_divide_by_nothing(runs, exports):
    import onnxruntime

    session = onnxruntime.InferenceSession(exports(MODELS[0], "onnx") / "model.onnx")
    model = load(runs / MODELS[0]).model
    for size in ((33, 47), (50, 77), (96, 64), (32, 120)):
        images = torch.randn(2, 3, *size)
        model.reset_buffers(size)
        with torch.no_grad():
            maps = model.forward_features(images)
            told = [model.classify(maps[-1]), *maps]
        found = session.run(None, {"images": images.numpy()})
        for one, other in zip(found, told, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-3, atol=1e-4)


def test_the_card_tells_what_was_trained_on_and_what_was_measured(exports):
    text = (exports(MODELS[0], "timm") / "README.md").read_text()
    told = ("recipe | demo", f"step | {STEP}", "index abc123", "top-1 61.25 %, top-5 83.50 %")
    for words in told:
        assert words in text
    front = text.split("---\n")[1]
    index = json.loads(front.split("model-index: ")[1])
    assert [metric["value"] for metric in index[0]["results"][0]["metrics"]] == [61.25, 83.5]


def test_transformers_prepares_a_photograph_as_evaluations_do(runs, exports):
    from PIL import Image
    from transformers import AutoImageProcessor

    for form in ("timm", "official"):
        processor = AutoImageProcessor.from_pretrained(exports(MODELS[0], form))
        with Image.open(PHOTO) as photo:
            found = processor(photo.convert("RGB"), return_tensors="pt")["pixel_values"]
        source = load(runs / MODELS[0])
        pixels = np.empty((1, SIZE, SIZE, 3), np.uint8)
        spec = EvalSpec(size=SIZE, crop_pct=source.crop_pct)
        assert spec.render([Sample(id=0, image=PHOTO.read_bytes(), label=0)], pixels) == {}
        told = normalize(torch.from_numpy(pixels), mean=source.mean, std=source.std)
        assert found.shape == told.shape
        levels = (found - told).abs() * torch.tensor(source.std)[:, None, None] * 255
        assert levels.max() <= 1.5, "of 255"
        assert levels.mean() <= 0.1


SHAPES = """
import sys, torch
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification
from transformers import UperNetConfig, UperNetForSemanticSegmentation

where, own = sys.argv[1], {"trust_remote_code": True}
images = torch.randn(2, 3, 40, 56)
config = AutoConfig.from_pretrained(where, out_indices=[1, 3], **own)
backbone = type(AutoBackbone.from_config(config)).from_pretrained(where, config=config)
maps = backbone(images).feature_maps
assert [m.shape[1] for m in maps] == backbone.channels, "the maps that were asked for"

tuned = AutoModelForImageClassification.from_pretrained(
    where, num_labels=3, ignore_mismatched_sizes=True, **own
)
told = AutoModelForImageClassification.from_pretrained(where, **own).state_dict()
for name, value in tuned.state_dict().items():
    if value.shape == told[name].shape:
        assert torch.equal(value, told[name]), name
    else:
        assert value.isfinite().all(), name
        assert value.shape[0] == 3, name
out = tuned(images, labels=torch.tensor([0, 2]))
out.loss.backward()
assert out.logits.shape == (2, 3)
tuned.save_pretrained(sys.argv[2])
again = AutoModelForImageClassification.from_pretrained(sys.argv[2], **own).eval()
torch.testing.assert_close(again(images).logits, tuned.eval()(images).logits)

config = AutoConfig.from_pretrained(where, **own)
head = UperNetForSemanticSegmentation(UperNetConfig(
    backbone_config=config, num_labels=5, hidden_size=8, auxiliary_in_channels=96,
    auxiliary_channels=8, pool_scales=[1],
)).eval()
head.backbone.load_state_dict(
    type(head.backbone).from_pretrained(where, config=config).state_dict()
)
assert head(images).logits.shape == (2, 5, 40, 56)
"""


def test_transformers_fine_tunes_saves_and_puts_heads_on_a_bundle(exports, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-B", "-c", SHAPES, exports(MODELS[0], "timm"), tmp_path / "tuned"],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def command(*arguments):
    """Run the command in this process; return its exit code and what it said of mistakes."""
    said = io.StringIO()
    with redirect_stderr(said), mock.patch.object(sys, "argv", ["export", *map(str, arguments)]):
        return main(), said.getvalue()


def test_a_damaged_or_foreign_folder_is_one_line_before_anything_in_it_runs(exports, tmp_path):
    copy = tmp_path / "copy"

    def fresh():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(exports(MODELS[0], "timm"), copy)

    def cut(name):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[: len(data) // 2])

    damages = {
        "a truncated file": lambda: cut("model.safetensors"),
        "a missing file": lambda: (copy / "config.json").unlink(),
        "other code": lambda: (copy / "foveate_model.py").write_text("import os; os._exit(3)"),
        "another check": lambda: (copy / "verify.py").write_text("print('fine')"),
        "truncated hashes": lambda: cut("SHA256SUMS"),
        "no hashes": lambda: (copy / "SHA256SUMS").unlink(),
        "binary hashes": lambda: (copy / "SHA256SUMS").write_bytes(b"\xff\xfe"),
    }
    for what, damage in damages.items():
        fresh()
        damage()
        with mock.patch.object(folder, "run_check", side_effect=AssertionError(what)):
            code, said = command("--verify", copy)
        assert (code, said.count("\n")) == (2, 1), what
        assert said.startswith(f"error: {copy}"), what
    (tmp_path / "file").touch()
    for nothing in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        code, said = command("--verify", nothing)
        assert (code, said.count("\n")) == (2, 1)
        assert "is not a folder that foveate export wrote" in said


def test_a_damaged_bundle_as_a_source_is_one_line_and_none_of_its_code_runs(exports, tmp_path):
    shutil.copytree(exports(MODELS[0], "timm"), tmp_path / "copy")
    for code in (tmp_path / "copy").glob("*.py"):
        code.write_text("raise SystemExit('it was run')")
    assert load(tmp_path / "copy").config.name == MODELS[0]
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, said = command(tmp_path / "copy", "--format", "onnx", "--out", tmp_path / "out")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: cannot read weights from {weights}")


def test_a_damaged_checkpoint_is_one_line(runs, tmp_path):
    shutil.copytree(runs / MODELS[0], tmp_path / "run")
    (share,) = (tmp_path / "run").rglob("rank_00001.safetensors")
    share.write_bytes(share.read_bytes()[:-1] + b"x")
    code, said = command(tmp_path / "run", "--format", "timm", "--out", tmp_path / "out")
    assert (code, said) == (2, f"error: {share} does not match its hash\n")


def test_a_file_of_the_authors_is_a_source_like_a_run(exports, runs, tmp_path):
    told = load_file(exports(MODELS[1], "timm") / "sample.safetensors")
    save_official(load(runs / MODELS[1]).model, tmp_path / "official.pth")
    options = ("--model", MODELS[1], "--img-size", SIZE, "--format", "dense")
    with unchecked():
        code, said = command(tmp_path / "official.pth", *options, "--out", tmp_path / "dense")
    assert (code, said) == (0, "")
    found = load_file(tmp_path / "dense" / "sample.safetensors")
    assert "logits" not in found
    torch.testing.assert_close(found["map4"], told["map4"])
    assert "Weights from official.pth" in (tmp_path / "dense" / "README.md").read_text()
    wrong = ("--model", "transxnet_t", *options[2:], "--out", tmp_path / "out")
    code, said = command(tmp_path / "official.pth", *wrong)
    assert (code, said.count("\n")) == (2, 1)
    assert "holds weights of transxnet_pico, not of --model transxnet_t" in said


def test_what_a_format_has_no_room_for_is_refused(runs, tmp_path):
    timms = SimpleNamespace(config=SimpleNamespace(name="timm:test_vit"))
    with pytest.raises(UserError, match="is timm's own: export it as timm, onnx or torch"):
        export(timms, tmp_path / "out", form="dense")
    for arguments, said in {
        ("run",): "no format is given",
        ("run", "--format", "tflite"): "invalid choice: 'tflite'",
        (): "no source is given",
    }.items():
        code, text = command(*arguments)
        assert (code, text.count("\n")) == (2, 1)
        assert said in text


MEMORY = """
import sys
from pathlib import Path
from trainer.exports import folder
from trainer.exports.formats import export
from trainer.exports.source import load

def mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

folder.run_check = lambda *_: None  # it has a process of its own
export(load(Path(sys.argv[4])), Path(sys.argv[5]), form="timm")  # loads what has to be loaded
before = mib("VmRSS")
source = load(Path(sys.argv[1]))
export(source, Path(sys.argv[2]), form=sys.argv[3])
weights = sum(t.numel() * t.element_size() for t in source.model.state_dict().values()) / 2**20
print((mib("VmHWM") - before) / weights)
"""


def test_an_export_takes_little_more_memory_than_the_model(runs, tmp_path):
    model = randomised("transnext_tiny", size=64, num_classes=1000)
    named = ("--model.name", "transnext_tiny", "--model.img-size", "64")
    write_run(tmp_path / "run", model, *named, "--model.num-classes", "1000")
    for form in ("timm", "official"):
        done = subprocess.run(
            [
                *(sys.executable, "-c", MEMORY, tmp_path / "run", tmp_path / form, form),
                *(runs / MODELS[0], tmp_path / f"{form}-first"),
            ],
            env=python_environment(ROOT), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) <= 1.5
