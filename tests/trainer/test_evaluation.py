"""Published test sets: layouts, masks, counting rules and the mean corruption error."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launcher import rundir
from launcher.local import python_environment
from models.convert import save_official
from models.registry import build
from tests.dist import run_distributed
from tests.trainer.testsets import SYNSETS, write_sets
from trainer.config import UserError
from trainer.evaluation.measure import Loading, Setting, measure, settings_for, spec_for
from trainer.evaluation.scores import ALEXNET_ERRORS, corruption_errors
from trainer.evaluation.sets import BENCHMARKS, find
from trainer.pretrained import Pretrained
from trainer.sections import ModelConfig

SIDE = 32
LIKELY = [0, 1, 2, 4, 6, 7, 10, 11, 13, 999]
HEAD = {"transnext_pico": "head.bias", "transxnet_pico": "classifier.2.bias"}
LOADING = Loading(batch_size=2, num_workers=1, precision="fp32")


def network(name="transnext_pico", num_classes=1000):
    """A network of random weights that tells images apart, and prefers classes that occur."""
    torch.manual_seed(6)
    model = build(name, img_size=SIDE, num_classes=num_classes, drop_path=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        if num_classes == 1000:
            model.get_parameter(HEAD[name]).index_fill_(0, torch.tensor(LIKELY), 4.0)
    config = ModelConfig(name=name, img_size=SIDE, num_classes=num_classes)
    return Pretrained(source="random", config=config, model=model)


def measure_all(rank, world_size, specs):
    source = network()
    scores = {}
    for one in find(specs, num_classes=1000):
        score = measure(source, one, Setting(side=SIDE), LOADING, say=lambda line: None)
        scores[score.data] = {"images": score.images, "top1": score.top1, "top5": score.top5}
        if score.corruptions is not None:
            scores[score.data]["mce"] = score.mce
    return scores


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module", params=[1, 2])
def answers(request, specs):
    return run_distributed(measure_all, request.param, specs)


@pytest.fixture(scope="module")
def logits_of(specs):
    """Logits [1000] of an image file, at the published crop or whole, by Pillow alone."""
    source = network()

    @torch.no_grad()
    def logits(path, *, whole):
        short = SIDE if whole else math.floor(SIDE / 0.875)
        with Image.open(path) as picture:
            width, height = picture.size
            size = (short, int(short * height / width))
            if width > height:
                size = (int(short * width / height), short)
            resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        left, top = (round((side - SIDE) / 2) for side in resized.size)
        pixels = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
        pixels = (pixels - source.mean) / source.std
        return source.model(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])[0]

    return logits


def ranking(logits, classes=range(1000)):
    """Classes from the likeliest to the unlikeliest, among some."""
    return sorted(classes, key=lambda label: -float(logits[label]))


def percent(flags):
    return 100 * sum(flags) / len(flags)


def synset_index():
    import timm.data

    return {name: n for n, name in enumerate(timm.data.ImageNetInfo().label_names())}


def files(spec):
    return sorted(Path(spec.partition("=")[2]).glob("*/*.JPEG"))


@pytest.mark.parametrize("name", ["imagenet", "imagenet-sketch", "imagenet-v2"])
def test_top1_and_top5_are_those_of_a_direct_computation(name, specs, answers, logits_of):
    (spec,) = [spec for spec in specs if spec.startswith(f"{name}=")]
    index = synset_index() if name != "imagenet-v2" else {str(n): n for n in range(1000)}
    right = [(ranking(logits_of(p, whole=False)), index[p.parent.name]) for p in files(spec)]
    for answer in answers:
        assert answer[name]["images"] == len(right)
        for k in (1, 5):
            truth = percent([label in order[:k] for order, label in right])
            assert answer[name][f"top{k}"] == pytest.approx(truth), name
        assert 0 < answer[name]["top5"] < 100, "the case tells something"


@pytest.mark.parametrize(("name", "short"), [("imagenet-a", "a"), ("imagenet-r", "r")])
def test_predictions_are_made_among_the_200_classes_of_the_set(
    name, short, specs, answers, logits_of
):
    import timm.data

    info = Path(timm.data.__file__).parent / "_info" / f"imagenet_{short}_indices.txt"
    among = [int(line) for line in info.read_text().split()]
    (spec,) = [spec for spec in specs if spec.startswith(f"{name}=")]
    index = synset_index()
    orders = [
        (ranking(logits_of(p, whole=False), among), index[p.parent.name]) for p in files(spec)
    ]
    for k in (1, 5):
        truth = percent([label in order[:k] for order, label in orders])
        assert truth > 0, "the case tells something"
        for answer in answers:
            assert answer[name][f"top{k}"] == pytest.approx(truth)


def test_real_counts_a_guess_among_an_images_labels_and_leaves_out_those_without(
    specs, answers, logits_of
):
    (spec,) = [spec for spec in specs if spec.startswith("imagenet=")]
    paths = files(spec)
    real = json.loads((paths[0].parents[2] / "real.json").read_text())
    labels = [set(real[int(path.stem[-8:]) - 1]) for path in paths]
    kept = [
        (ranking(logits_of(p, whole=False)), ls) for p, ls in zip(paths, labels, strict=True) if ls
    ]
    assert 0 < len(kept) < len(paths)
    for answer in answers:
        assert answer["imagenet-real"]["images"] == len(kept)
        for k in (1, 5):
            truth = percent([bool(labels & set(order[:k])) for order, labels in kept])
            assert 0 < truth < 100, "the case tells something"
            assert answer["imagenet-real"][f"top{k}"] == pytest.approx(truth)


def test_the_corruption_error_is_the_published_formula(specs, answers, logits_of):
    root = Path(specs[-1].partition("=")[2])
    index, relative = synset_index(), []
    for kind, alexnet in ALEXNET_ERRORS.items():
        errors = []
        for severity in range(1, 6):
            paths = sorted((root / kind / str(severity)).glob("*/*.JPEG"))
            orders = [(ranking(logits_of(p, whole=True)), index[p.parent.name]) for p in paths]
            errors.append(percent([order[0] != label for order, label in orders]))
        relative.append(sum(errors) / (5 * alexnet))
    assert len(set(relative)) > 2, "the case tells something"
    for answer in answers:
        assert answer["imagenet-c"]["images"] == 150
        assert answer["imagenet-c"]["mce"] == pytest.approx(100 * sum(relative) / 15)


def test_alexnet_itself_has_a_mean_corruption_error_of_100():
    top1 = {
        f"{kind}/{s}": 100 - e + s - 3 for kind, e in ALEXNET_ERRORS.items() for s in range(1, 6)
    }
    assert all(error.relative == pytest.approx(100) for error in corruption_errors(top1).values())
    assert len(ALEXNET_ERRORS) == 15


def test_images_are_cropped_as_published_and_squashed_from_384_on(specs):
    source = network()
    sets = {one.name: one for one in find(specs, num_classes=1000)}
    at = {side: spec_for(source, sets["imagenet"], Setting(side=side)) for side in (224, 384)}
    assert (at[224].crop_pct, at[224].squash) == (0.875, False)
    assert at[384].squash
    assert spec_for(source, sets["imagenet-c"], Setting(side=224)).crop_pct == 1.0


def test_a_new_size_of_transnext_is_measured_in_both_position_modes():
    model = network().model
    settings = settings_for(model, [32, 48])
    assert [str(one) for one in settings] == ["32", "48 extrapolated", "48 interpolated"]
    images, logits = torch.randn(1, 3, 48, 48), []
    for setting, options in zip(settings[1:], ({}, {"position_mode": "interpolate"}), strict=True):
        setting.apply(model)
        other = build("transnext_pico", img_size=SIDE, pretrain_size=SIDE, **options).eval()
        other.load_state_dict(model.state_dict())
        other.reset_buffers((48, 48))
        with torch.no_grad():
            logits.append(model(images))
            assert torch.equal(logits[-1], other(images))
    assert not torch.allclose(*logits)
    assert [str(one) for one in settings_for(network("transxnet_pico").model, [48])] == ["48"]


def test_images_of_the_models_own_classes_need_no_published_name(tmp_path):
    write_sets(tmp_path)
    (own,) = find([f"imagenet100={tmp_path / 'val'}"], num_classes=len(SYNSETS))
    assert own.among is None
    assert list(own.parts[0].open().labels) == [n // 3 for n in range(12)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{root}/val", "give NAME=PATH, such as imagenet="),
        ("imagenet={root}/nowhere", "nowhere is no folder"),
        ("imagnet-a={root}/a", r"no published set .* did you mean imagenet-a\?"),
        ("v2={root}/v2", r"did you mean imagenet-v2\?"),
        ("imagenet-v2={root}/val", "holds n01440764, n01498041, .*not of the 1000 classes"),
        ("imagenet-a={root}/sketch", "holds n01440764, not of the 200 classes of imagenet-a"),
        ("imagenet={root}/v2", "holds 0, 10, 2 and 1 more, not of .* WordNet id"),
        ("imagenet-c={root}/val", "lacks 75 of its 75 folders CORRUPTION/SEVERITY"),
        ("imagenet-c={root}/torn", "lacks 1 of its 75 folders .* such as snow/4"),
        ("imagenet-real={root}/renamed", "is not called as ImageNet's files are"),
        ("mine={root}/val", "has 4 classes and the model 1000"),
    ],
)
def test_what_is_wrong_with_a_set_is_one_message_before_anything_runs(spec, message, tmp_path):
    write_sets(tmp_path, per_class=1)
    (tmp_path / "renamed" / SYNSETS[0]).mkdir(parents=True)
    picture = next(tmp_path.glob("val/*/*.JPEG"))
    (tmp_path / "renamed" / SYNSETS[0] / "1.JPEG").write_bytes(picture.read_bytes())
    if "torn" in spec:
        (tmp_path / "c").rename(tmp_path / "torn")
        (tmp_path / "torn" / "snow" / "4").rename(tmp_path / "snow")
    with pytest.raises(UserError, match=message):
        find([spec.format(root=tmp_path)], num_classes=1000)


def test_a_published_set_needs_a_model_of_its_classes(specs):
    with pytest.raises(UserError, match=r"needs a model of ImageNet-1k's 1000 classes.* has 10"):
        find(specs[:1], num_classes=10)


def test_a_set_is_named_once(specs):
    with pytest.raises(UserError, match="imagenet is given twice"):
        find([specs[0], specs[0]], num_classes=1000)


def evaluate_command(*arguments, processes=None):
    command = [sys.executable, "-m"]
    if processes is not None:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["--no-python", sys.executable, "-m"]
    return subprocess.run(
        [*command, "launcher", "evaluate", *map(str, arguments)],
        env={**python_environment(rundir.CODE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_its_files(specs, tmp_path):
    save_official(network("transxnet_pico").model, tmp_path / "net.pth")
    arguments = [tmp_path / "net.pth", "--data", *specs[:4], "--img-size", 32, 48]
    arguments += ["--batch-size", 2, "--num-workers", 1, "--precision", "bf16"]
    done = evaluate_command(*arguments, "--out", tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stderr
    assert "imagenet at 32: 12 of 12 images" in done.stderr
    assert f"NOTE: imagenet has 12 of its {BENCHMARKS['imagenet'].images} images" in done.stdout
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(written["scores"]) == 8
    markdown = (tmp_path / "out" / "evaluation.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| imagenet-a ")]
    for row, key in zip(rows, ("top1", "top5"), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        values = [one[key] for one in written["scores"] if one["data"] == "imagenet-a"]
        assert cells[3:] == [f"{value:.2f}" for value in values]
        assert row in done.stdout
    again = evaluate_command(*arguments, "--out", tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "is there already" in again.stderr
    assert again.stderr.count("\n") == 1


@pytest.mark.slow
def test_several_processes_name_a_mistake_once(tmp_path):
    done = evaluate_command("transnext_pico", "--data", f"imagenet={tmp_path}/x", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: --data imagenet") == 1
