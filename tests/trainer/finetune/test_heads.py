"""Every head as a run: it leaves what it promises, and goes on exactly where it was."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from launcher.process import Process
from tests.dist import run_distributed
from tests.trainer.finetune.drawn import draw_split
from trainer.finetune import detect, segment
from trainer.finetune.__main__ import prepare

pytestmark = pytest.mark.slow
STEPS, SAVED = 6, 3
DETECTION = ("--data.scales", "48", "64", "--data.longest", "96")
SEGMENTATION = (
    *("--data.longest", "96", "--data.shortest", "64", "--data.crop", "48"),
    *("--data.ratios", "0.75", "1.5", "--eval.window", "48", "--eval.stride", "32"),
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    draw_split(root, "train", count=8)
    draw_split(root, "val", count=3, seed=1)
    return root


def arguments(head, drawn, out):
    task = "detect" if head in detect.HEADS else "segment"
    data = ["--data.train", drawn / "train", "--data.val", drawn / "val", *DETECTION]
    if task == "segment":
        data = [
            *("--data.root", "None", "--data.train", drawn / "train"),
            *("--data.train-labels", drawn / "train_semantic", "--data.val", drawn / "val"),
            *("--data.val-labels", drawn / "val_semantic"),
            *("--data.classes", drawn / "classes.json", *SEGMENTATION),
        ]
    return task, [
        *("--head", head, "--backbone", "transxnet_pico", "--out", str(out), *map(str, data)),
        *("--model.img-size", "64", "--model.head-size", "small", "--model.drop-path", "0.1"),
        *("--train.epochs", "0", "--train.steps", str(STEPS), "--train.batch-size", "4"),
        *("--train.accumulate", "2", "--train.num-workers", "0", "--train.log-every", "1"),
        *("--train.save-every", str(SAVED), "--train.precision", "fp32", "--train.pictures", "1"),
        *("--train.eval-every", str(STEPS), "--optim.clip-grad", "1", "--optim.lr", "1e-3"),
        *("--optim.warmup-steps", "2", "--optim.layer-decay", "0.9"),
    ]


def train(rank, world_size, task, words):
    return prepare(task, words, Process.from_environment({})).run()


def lines(folder, kind):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


@pytest.mark.parametrize("head", [*detect.HEADS, *segment.HEADS])
def test_a_run_goes_on_exactly_and_is_scored(head, drawn, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_distributed(train, 1, *arguments(head, drawn, whole)) == [True]
    losses = [line["loss"] for line in lines(whole, "train")]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / f"step_{STEPS:010d}")
    (cut / "metrics.jsonl").unlink()
    (cut / "config.json").unlink()
    (cut / "model.safetensors").unlink()
    assert run_distributed(train, 1, *arguments(head, drawn, cut)) == [True]
    assert [line["loss"] for line in lines(cut, "train")] == losses[SAVED:]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    (scores,) = lines(whole, "eval")
    expected = {"box_ap", "box_ap50"} if head in detect.HEADS else {"miou", "macc", "aacc"}
    assert expected <= scores.keys()
    assert lines(cut, "eval")[0].keys() == scores.keys()
