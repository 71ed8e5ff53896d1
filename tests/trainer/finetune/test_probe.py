"""Probes: a linear layer and nearest neighbours, on features whose answers are known."""

import json

import pytest
import torch

from launcher.process import Process
from tests.dist import run_distributed
from trainer.finetune.probe import ProbeData, ProbeSettings, knn, linear_probe, probe
from trainer.pretrained import pretrained

SETTINGS = ProbeSettings(backbone="transnext_pico", out="", epochs=20, probe_batch=32)


def clusters(count, *, seed, classes=3, width=6):
    """Features around one random centre a class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centres[labels] + 0.1 * torch.randn(count, width, generator=generator), labels


def test_both_probes_tell_clusters_apart_and_not_noise():
    train, val = clusters(90, seed=0), clusters(30, seed=1)
    assert linear_probe(*train, *val, classes=3, settings=SETTINGS)["linear"] == 100
    assert knn(*train, *val, classes=3, count=5) == 100
    blind = torch.randn(300, 6, generator=torch.Generator().manual_seed(5))
    noise = (blind, torch.arange(300) % 3)
    assert linear_probe(*train, *noise, classes=3, settings=SETTINGS)["linear"] < 60
    assert knn(*train, *noise, classes=3, count=5) < 60


def test_the_rate_is_chosen_without_the_evaluation():
    train, val = clusters(90, seed=0), clusters(30, seed=1)
    lost = (val[0], (val[1] + 1) % 3)
    right, wrong = (
        linear_probe(*train, *split, classes=3, settings=SETTINGS) for split in (val, lost)
    )
    assert right["linear_lr"] == wrong["linear_lr"]
    assert wrong["linear"] == 0


def test_votes_weigh_what_their_cosine_says():
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels = torch.tensor([0, 1, 1])
    asked = torch.tensor([[2.0, 0.0]])
    # exp(1 / 0.07) against twice exp(0.8 / 0.07)
    assert knn(features, labels, asked, torch.tensor([0]), classes=2, count=3) == 100
    assert knn(features[1:], labels[1:], asked, torch.tensor([0]), classes=2, count=2) == 0


def score(rank, world_size, out, lr):
    data = ProbeData(
        source="synthetic", train="num_samples=50,num_classes=5,size=32",
        val="num_samples=21,num_classes=5,size=32", num_workers=1,
    )  # fmt: skip
    settings = ProbeSettings(
        backbone="transnext_pico", out=out, data=data, img_size=32, batch_size=8,
        neighbours=(5,), lr=lr, epochs=10,
    )  # fmt: skip
    probe(settings, pretrained("transnext_pico"), Process.from_environment({}))


@pytest.mark.slow
def test_features_are_computed_once_and_the_same_on_any_number_of_processes(tmp_path):
    scores, times = [], []
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        for lr in ((0.1, 1.0), (0.3,)):
            run_distributed(score, world_size, str(out), lr)
            times.append([path.stat().st_mtime_ns for path in sorted(out.glob("features/*"))])
        scores.append(json.loads((out / "probe.json").read_text())["scores"])
    assert times[0] == times[1]
    assert times[2] == times[3]
    assert scores[0] == pytest.approx(scores[1])
    assert {"linear", "linear_lr", "knn_5"} == scores[0].keys()
