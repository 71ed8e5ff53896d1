"""Exports of tiny trained runs: what timm makes of bundles where Foveate cannot be imported."""

import ast
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.local import python_environment
from launcher.process import Process
from models.convert import load_weights
from models.registry import build
from tests.dist import run_distributed
from tests.trainer.disk import on_small_disk
from tests.trainer.runs import tiny_config
from trainer.config import RunConfig, UserError
from trainer.exports.folder import run_check, verify
from trainer.exports.formats import export
from trainer.exports.sample import sample_images
from trainer.exports.source import load
from trainer.loop import Trainer

ROOT = Path(__file__).parents[2]
CLASSIFIERS = {"transnext_pico": "head", "transxnet_pico": "classifier.2"}
SIZE = 16  # of the images that the tiny runs are trained on
OTHER_SIZE = (24, 40)

pytestmark = pytest.mark.slow
FIRST = pytest.mark.parametrize("run", ["transnext_pico"], indirect=True)  # one family is enough


def train_and_show(rank, world_size, config):
    """Train, and return the logits of the model as evaluations see it, live and averaged."""
    run_config = RunConfig.from_json(config)
    Path(run_config.run_dir, "config.json").write_text(config)
    trainer = Trainer(run_config, Process.from_environment({}))
    assert trainer.run()
    trainer.engine.model.eval()
    with torch.no_grad():
        live = trainer.engine.model(sample_images((SIZE, SIZE)))
        with trainer.engine.ema.swapped():
            return {"live": live, "ema": trainer.engine.model(sample_images((SIZE, SIZE)))}


@pytest.fixture(scope="module", params=CLASSIFIERS)
def run(request, tmp_path_factory):
    """A finished run: its folder, the model's name, and its logits on the sample images."""
    run_dir = tmp_path_factory.mktemp(request.param)
    config = tiny_config(
        run_dir,
        *("--model.name", request.param, "--data.train", "num_samples=72,num_classes=10,size=20"),
        *("--train.epochs", "1", "--optim.warmup-epochs", "0", "--train.ema-decay", "0.5"),
    )
    (logits,) = run_distributed(train_and_show, 1, config.to_json())
    return SimpleNamespace(path=run_dir, name=request.param, logits=logits)


def foveate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, arguments)],
        env=python_environment(ROOT), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    """The run's averaged weights, exported by the command."""
    out = tmp_path_factory.mktemp("exports") / "timm"
    done = foveate("export", run.path, "--format", "timm", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "verified by timm" in done.stdout
    assert str(out) in done.stdout
    assert done.stderr == ""
    return out


LOOK = """
import json, sys
from pathlib import Path

for package in ("launcher", "trainer", "models", "data"):
    sys.modules[package] = None
bundle, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, bundle)
import foveate_timm
import timm
import torch
from safetensors.torch import load_file, save_file

def create(**options):
    torch.manual_seed(0)
    return timm.create_model(f"local-dir:{bundle}", **({"pretrained": True} | options)).eval()

images = load_file(bundle + "/sample.safetensors")["images"]
other = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
tensors, said = {}, {}
with torch.no_grad():
    model = create()
    tensors["logits"] = model(images)
    tensors["other"] = model(other)
    tensors["again"] = model(images)  # back at the first size
    tensors["other_from_start"] = create(img_size=(height, width))(other)
    last, maps = model.forward_intermediates(images)
    tensors["last"], tensors["features"] = last, model.forward_features(images)
    tensors["pooled"] = model.forward_head(last, pre_logits=True)
    said["data"] = timm.data.resolve_model_data_config(model)

    pyramid = create(features_only=True)
    said["channels"] = pyramid.feature_info.channels()
    said["reductions"] = pyramid.feature_info.reduction()
    for index, (one, two) in enumerate(zip(pyramid(images), maps, strict=True)):
        tensors[f"map{index}"], tensors[f"intermediate{index}"] = one, two
    chosen = create(features_only=True, out_indices=(1, 3))(images)
    said["chosen"] = [list(each.shape) for each in chosen]

    tuned = create(num_classes=5)
    tensors |= {f"tuned/{name}": value for name, value in tuned.state_dict().items()}
    tensors["tuned_logits"] = tuned(images)
    fresh = create(pretrained=False)
    tensors |= {f"fresh/{name}": value for name, value in fresh.state_dict().items()}
    tensors["fresh_logits"] = fresh(images)
    model.reset_classifier(5)
    tensors["reset_5"] = model(images)
    model.reset_classifier(0)
    tensors["reset_0"] = model(images)

learner = create(drop_path_rate=0.1).train()
learner(images).sum().backward()
said["without_gradient"] = [n for n, p in learner.named_parameters() if p.grad is None]
save_file({k: v.contiguous().clone() for k, v in tensors.items()}, sys.argv[4])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def seen(bundle, tmp_path_factory):
    """What timm made of the bundle in a fresh process."""
    out = tmp_path_factory.mktemp("seen") / "tensors.safetensors"
    command = [sys.executable, "-I", "-B", "-c", LOOK, bundle, *map(str, OTHER_SIZE), out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(tensors=load_file(out), **json.loads(done.stdout))


def test_timms_logits_are_those_of_the_run_itself(run, bundle, seen):
    sample = load_file(bundle / "sample.safetensors")
    torch.testing.assert_close(sample["logits"], run.logits["ema"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.tensors["logits"], run.logits["ema"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run.logits["ema"], run.logits["live"], rtol=1e-3)


def test_live_weights_are_exported_where_asked_for(run, tmp_path):
    export(load(run.path, weights="live"), tmp_path / "live", form="timm")
    sample = load_file(tmp_path / "live" / "sample.safetensors")
    torch.testing.assert_close(sample["logits"], run.logits["live"], rtol=1e-4, atol=1e-5)


def test_timm_sees_a_feature_pyramid(run, seen):
    model = load(run.path).model
    assert seen.channels == [info["num_chs"] for info in model.feature_info]
    assert seen.reductions == [info["reduction"] for info in model.feature_info]
    expected = model.forward_features(sample_images((SIZE, SIZE)))
    for index, (channels, reduction) in enumerate(zip(seen.channels, seen.reductions, strict=True)):
        side = SIZE // reduction
        assert seen.tensors[f"map{index}"].shape == (2, channels, side, side)
        for name in (f"map{index}", f"intermediate{index}"):
            torch.testing.assert_close(
                seen.tensors[name], expected[index].detach(), rtol=1e-4, atol=1e-5
            )
    assert seen.chosen == [list(seen.tensors[f"map{index}"].shape) for index in (1, 3)]
    for name in ("last", "features"):
        assert torch.equal(seen.tensors[name], seen.tensors["map3"])


def test_another_input_size_works(run, seen):
    height, width = OTHER_SIZE
    model = load(run.path).model
    model.reset_buffers(OTHER_SIZE)
    other = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
    with torch.no_grad():
        expected = model(other)
    for name in ("other", "other_from_start"):
        torch.testing.assert_close(seen.tensors[name], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.tensors["again"], seen.tensors["logits"])


def test_another_number_of_classes_gets_a_new_head_on_the_old_body(run, bundle, seen):
    weights, classifier = load_file(bundle / "model.safetensors"), CLASSIFIERS[run.name]
    for name, value in weights.items():
        tuned = seen.tensors[f"tuned/{name}"]
        if name.startswith(f"{classifier}."):
            assert tuned.shape == (5, *value.shape[1:])
            # As drawn by the family's own initialisation, small and alive.
            assert tuned.std() < 0.1
            assert tuned.isfinite().all()
        else:
            assert torch.equal(tuned, value), name
    assert seen.tensors[f"tuned/{classifier}.weight"].std() > 0.001
    assert seen.tensors["tuned_logits"].shape == (2, 5)


def test_without_pretraining_the_weights_are_drawn_as_the_family_draws_them(run, seen):
    assert seen.tensors["fresh_logits"].isfinite().all()
    torch.manual_seed(1)
    for name, drawn in build(run.name, img_size=SIZE, num_classes=10).state_dict().items():
        fresh = seen.tensors[f"fresh/{name}"].double()
        assert fresh.shape == drawn.shape
        if drawn.numel() > 50:
            # Two samples of n numbers differ in their deviation by about 1 / sqrt(n) of it.
            rtol = 5 / drawn.numel() ** 0.5
            torch.testing.assert_close(fresh.std(), drawn.double().std(), rtol=rtol, atol=1e-9)
        if drawn.unique().numel() == 1:  # a constant, not a draw
            assert torch.equal(fresh, drawn.double()), name


def test_the_classifier_can_be_replaced_or_taken_away(seen):
    assert seen.tensors["reset_5"].shape == (2, 5)
    assert seen.tensors["reset_0"].shape == (2, seen.channels[-1])
    torch.testing.assert_close(seen.tensors["reset_0"], seen.tensors["pooled"])


def test_a_bundle_can_be_fine_tuned(seen):
    assert seen.without_gradient == []


def test_the_preprocessing_is_the_runs(run, bundle, seen):
    config = json.loads((run.path / "config.json").read_text())
    assert seen.data == {
        "input_size": [3, SIZE, SIZE],
        "interpolation": "bicubic",
        "mean": config["data"]["mean"],
        "std": config["data"]["std"],
        "crop_pct": config["eval"]["crop_pct"],
        "crop_mode": "center",
    }
    cfg = json.loads((bundle / "config.json").read_text())["pretrained_cfg"]
    assert cfg["classifier"] == CLASSIFIERS[run.name]


def test_the_model_file_stands_alone_and_its_modules_do_not_collide(bundle):
    tree = ast.parse((bundle / "foveate_model.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"launcher", "trainer", "models", "data"}
    counted = Counter(defined(tree.body))
    assert [name for name, count in counted.items() if count > 1] == []
    assert {"Backbone", "OwnModel", "build_model", "load_model"} <= counted.keys()


def defined(body):
    """The names that the top level of a file defines, once for each definition."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


@FIRST
def test_altered_weights_do_not_verify(bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    weights = load_file(copy / "model.safetensors")
    name = next(name for name, value in weights.items() if value.dim() == 4)
    weights[name][0, 0, 0, 0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors does not match its hash"):
        verify(copy)
    assert "logits differ by" in run_check(copy)


@FIRST
def test_a_bundle_that_does_not_verify_is_not_written(run, tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise ImportError('a broken timm')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        export(load(run.path), out, form="timm")
    said = "the export does not verify: ImportError: a broken timm"
    assert str(error.value) == f"{out} is not written: {said}"
    assert [path.name for path in tmp_path.iterdir()] == ["timm.py"]


@FIRST
def test_a_bundle_is_verified_with_what_pythonpath_holds_but_foveate(bundle, tmp_path, monkeypatch):
    """As the torch of a cluster's module is."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "of_the_cluster.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path / 'modules'}")
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    model = copy / "foveate_model.py"
    checks = f"import os, of_the_cluster\nassert {str(ROOT)!r} not in os.environ['PYTHONPATH']"
    model.write_text(f"{model.read_text()}\n{checks}\n")
    assert run_check(copy) is None
    model.write_text(f"{model.read_text()}\nimport trainer\n")
    assert "trainer" in run_check(copy)


@FIRST
def test_the_current_folder_can_be_the_source_and_the_target(run, tmp_path, monkeypatch):
    monkeypatch.chdir(next((run.path / "checkpoints").glob("step_*")))
    source = load(Path())
    assert source.checkpoint == Path.cwd()
    monkeypatch.chdir(tmp_path)
    export(source, Path(), form="timm")
    assert (tmp_path / "config.json").exists()


@FIRST
def test_what_is_in_the_way_is_left_alone(run, bundle, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in bundle.iterdir()}
    (tmp_path / "file").write_text("mine")
    for out in (bundle, tmp_path / "file"):
        with pytest.raises(UserError) as error:
            export(load(run.path), out, form="timm")
        said = f"{out} is not an empty folder: remove it, or give another --out"
        assert str(error.value) == said
    assert {path: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"


@FIRST
def test_a_full_disk_is_one_line(run, tmp_path):
    out = tmp_path / "timm"
    export = [sys.executable, "-m", "trainer.exports", run.path, "--format", "timm", "--out", out]
    # The shell looks at the disk before it is gone.
    look = ["sh", "-c", '"$@"; code=$?; ls -A "$0"; exit $code', tmp_path, *export]
    done = subprocess.run(
        on_small_disk(tmp_path, list(map(str, look)), num_bytes=100_000),
        env=python_environment(ROOT), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {out} cannot be written: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "", "nothing is left behind"


@FIRST
def test_an_interrupted_export_leaves_no_bundle_and_is_done_again(run, tmp_path):
    out = tmp_path / "timm"
    command = [sys.executable, "-m", "launcher", "export", run.path, "--format", "timm"]
    with subprocess.Popen(
        [*map(str, command), "--out", str(out)],
        env=python_environment(ROOT), stdout=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        while not list(tmp_path.glob("*/model.safetensors")):
            assert running.poll() is None
        running.kill()
    assert not out.exists()
    export(load(run.path), out, form="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["timm"]


@FIRST
def test_a_run_becomes_a_file_of_the_authors_code(run, bundle, tmp_path):
    weights = load_file(bundle / "model.safetensors")
    for layout, classes in (("classification", 10), ("dense", 0)):
        export(load(run.path), tmp_path / layout, form="official", layout=layout)
        model = build(run.name, img_size=SIZE, num_classes=classes)
        assert load_weights(model, tmp_path / layout / "model.pth") == []
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_batch_norms_are_folded_where_asked_for(run, bundle, tmp_path):
    options = "--format", "timm", "--fold-batch-norm", "--out", tmp_path / "folded"
    done = foveate("export", run.path, *options)
    if run.name.startswith("transnext"):
        assert done.returncode == 2
        assert "has no batch norm to fold" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "folded" / "sample.safetensors")["logits"]
    torch.testing.assert_close(logits, load_file(bundle / "sample.safetensors")["logits"])
    norms, fewer = (
        [name for name in load_file(path / "model.safetensors") if name.endswith("running_var")]
        for path in (bundle, tmp_path / "folded")
    )
    assert len(fewer) == build(run.name).num_blocks < len(norms)


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    cases = {
        tmp_path / "nowhere": "does not exist: give a run folder",
        tmp_path / "empty": "is neither a run folder nor a whole checkpoint",
        tmp_path / "young": "has no checkpoint yet",
        Path("transnext_pico"): "has learnt nothing",
    }
    for source, reason in cases.items():
        with pytest.raises(UserError, match=reason) as error:
            load(source)
        assert str(source) in str(error.value)
    done = foveate("export", tmp_path / "empty", "--format", "timm", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'empty'} is neither ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
