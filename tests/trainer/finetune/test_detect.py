"""Detectors, from the command that a user types to the files that it leaves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.local import python_environment
from launcher.process import Process
from models.registry import build
from tests.trainer.finetune.drawn import CLASSES, draw_split
from trainer.config import UserError
from trainer.finetune.__main__ import prepare
from trainer.finetune.coco_data import CocoSplit
from trainer.finetune.coco_metrics import average_precision, detections
from trainer.finetune.detection_views import DetectionViews
from trainer.finetune.heads.pyramid_detectors import SIZES, OneStage, TwoStage
from trainer.finetune.trunk import Trunk
from trainer.sections import DataConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    draw_split(root, "train", count=12)
    draw_split(root, "val", count=5, seed=1)
    return root


def finetune(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "launcher", "finetune", *map(str, arguments)],
        env=python_environment(ROOT), capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def small(drawn, out, *more, head="retinanet", steps=6):
    return (
        *("detect", "--head", head, "--backbone", "transnext_pico", "--out", out),
        *("--data.train", drawn / "train", "--data.val", drawn / "val"),
        *("--data.scales", 48, 64, "--data.longest", 96, "--model.img-size", 64),
        *("--model.head-size", "small", "--train.epochs", 0, "--train.steps", steps),
        *("--train.batch-size", 2, "--train.num-workers", 1, "--train.log-every", 1),
        *("--train.save-every", 3, "--train.precision", "fp32", "--optim.clip-grad", 1),
        *("--train.eval-every", 6, "--model.drop-path", 0.1, *more),
    )


def lines(folder, kind):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_exactly(drawn, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = finetune(*small(drawn, whole, "--nproc", 2, head="mask_rcnn"))
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole, cut)
    begun_elsewhere = ("config.json", "metrics.jsonl", "model.safetensors")
    for left in (*begun_elsewhere, "checkpoints/step_0000000006"):
        path = cut / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = finetune(*small(drawn, cut, "--nproc", 2, head="mask_rcnn"))
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in lines(cut, "train")] == [4, 5, 6]
    assert [line["loss"] for line in lines(cut, "train")] == [
        line["loss"] for line in lines(whole, "train")[3:]
    ]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    scores = lines(whole, "eval")[-1]
    assert {"box_ap", "box_ap50", "mask_ap", "mask_ap50"} <= scores.keys()
    assert scores["box_ap"] == lines(cut, "eval")[-1]["box_ap"]
    assert list((whole / "tensorboard").iterdir())


@pytest.mark.slow
def test_mistakes_are_one_line_before_anything_is_trained(drawn, tmp_path):
    out = tmp_path / "out"
    torn = tmp_path / "torn"
    shutil.copytree(drawn, torn)
    first = torn / "train" / "0.jpg"
    first.write_bytes(first.read_bytes()[:300])
    cases = {
        "--head": ["--backbone", "transnext_pico", "--out", out],
        "nowhere does not exist": ["--head", "dino", "--backbone", "nowhere", "--out", out],
        "did you mean --optim.lr?": small(drawn, out, "--optim.lrr", 3)[1:],
        "a split in COCO's format": small(drawn, out, "--data.val", tmp_path)[1:],
        "does not divide among": small(drawn, out, "--train.accumulate", 4)[1:],
    }
    for said, arguments in cases.items():
        with pytest.raises(UserError) as error:
            prepare("detect", list(map(str, arguments)), Process.from_environment({}))
        assert said in str(error.value)
        assert "\n" not in str(error.value)
    done = finetune(*small(torn, out, steps=12))
    assert done.returncode == 2, done.stderr
    assert "0.jpg cannot be read" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_settings_of_a_run_are_kept(drawn, tmp_path):
    out = tmp_path / "out"
    (out).mkdir()
    (out / "config.json").write_text(json.dumps({"optim": {"lr": 3.0}}))
    done = finetune(*small(drawn, out))
    assert done.returncode == 2
    assert "was begun with" in done.stderr


@pytest.mark.parametrize(
    ("head", "name", "published"),
    [(TwoStage, "transnext_tiny", 47.9e6)],
)
def test_the_number_of_parameters_is_the_published_one(head, name, published):
    with torch.device("meta"):
        model = head(
            Trunk(build(name, num_classes=0)), num_classes=80, mean=DataConfig.mean,
            std=DataConfig.std, side=800, longest=1333, size=SIZES["published"],
        )  # fmt: skip
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(published, rel=0.02)


def test_truth_given_as_an_answer_is_perfect(drawn):
    split = CocoSplit(drawn / "val")
    assert split.classes == CLASSES
    results = []
    for index in range(len(split)):
        target = split.target(index, masks=True)
        found = {
            **target,
            "scores": torch.ones(len(target["labels"])),
            "masks": target["masks"][:, None].float(),
        }
        results += detections(split, index, found)
    scores = average_precision(split, results, masks=True)
    assert scores["box_ap"] == pytest.approx(100)
    assert scores["mask_ap"] == pytest.approx(100)
    shifted = [{**one, "bbox": [b + 12 for b in one["bbox"][:2]] + one["bbox"][2:]}
               for one in results]  # fmt: skip
    assert average_precision(split, shifted, masks=False)["box_ap"] < 20


@pytest.mark.parametrize("crop", [False, True])
def test_boxes_and_masks_follow_their_picture(drawn, crop):
    views = DetectionViews(
        CocoSplit(drawn / "train"), scales=(48, 80), longest=100, crop=crop, masks=True
    )
    for index in range(len(views)):
        torch.manual_seed(index)
        image, target = views.view(index)
        assert image.dtype == torch.float32
        assert min(image.shape[1:]) in (48, 80) or max(image.shape[1:]) == 100
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for box, label, mask in zip(
            target["boxes"], target["labels"], target["masks"], strict=True
        ):
            rows, columns = mask.nonzero().T
            around = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            assert (around - box).abs().max() <= 3.5
            blue, red = image[2][mask.bool()], image[0][mask.bool()]
            assert (red.mean() > blue.mean()) == bool(label)


@pytest.mark.parametrize("head", [TwoStage, OneStage])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_weight_learns_from_pictures_of_any_size(head, precision):
    model = head(
        Trunk(build("transxnet_pico", img_size=64, num_classes=0, drop_path=0.0)), num_classes=2,
        mean=DataConfig.mean, std=DataConfig.std, side=64, longest=96, size=SIZES["small"],
    ).train()  # fmt: skip
    images = [torch.rand(3, 64, 80), torch.rand(3, 48, 64)]
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
    targets = [
        {**target, "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8)} for image in images
    ]
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        sum(model(images, targets).values()).backward()
    lost = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == []
    with torch.no_grad():
        found = model.eval()([torch.rand(3, 100, 70)])[0]
    assert found["boxes"].shape[1] == 4
    assert all(0 <= label < 2 for label in found["labels"])
