"""Fine-tuning as jobs of a real cluster, by the scripts as they are shipped."""

from __future__ import annotations

import json

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.runs import SCRIPTS, SMALL, TINY, wait_for_checkpoint
from tests.trainer.finetune.drawn import draw_split
from tests.trainer.runs import lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 60


def test_a_detector_on_two_nodes_goes_on_after_its_time(cluster, tmp_path):
    draw_split(tmp_path, "train", count=8)
    draw_split(tmp_path, "val", count=2, seed=1)
    arguments = (
        *("--head", "retinanet", "--backbone", "transnext_pico", "--out", "out"),
        *("--data.train", "train", "--data.val", "val", "--data.scales", "32"),
        *("--data.longest", "64", "--model.img-size", "32", "--model.head-size", "small"),
        *("--train.epochs", "0", "--train.steps", str(STEPS), "--train.batch-size", "2"),
        *("--train.num-workers", "0", "--train.log-every", "1", "--train.save-every", "5"),
        *("--train.precision", "fp32", "--train.eval-every", str(STEPS), "--optim.clip-grad", "1"),
    )
    job = cluster.submit(
        SCRIPTS / "finetune_detect.sh", *arguments, options=[*SMALL, "--nodes=2"], folder=tmp_path
    )
    out = tmp_path / "out"
    wait_for_checkpoint(cluster, job, out)
    cluster.run("scancel", "--signal=USR1", str(job))  # as --signal=USR1@300 does
    wait_until(lambda: bool(lines(out, "stop")), "a stop", lambda: cluster.diary(job))
    cluster.wait(job, "COMPLETED")
    (stop,), (first, second) = lines(out, "stop"), lines(out, "start")
    assert (first["step"], second["step"]) == (0, stop["step"])
    assert first["world_size"] == second["world_size"] == 2
    assert sorted({line["step"] for line in lines(out, "train")}) == list(range(1, STEPS + 1))
    assert (out / "model.safetensors").exists()
    assert "box_ap" in lines(out, "eval")[-1]


def test_a_classifier_begins_from_weights(cluster, tmp_path):
    """The whole way: a short pretraining, then the job that fine-tunes it at another size."""
    short = ("--train.epochs", "1", "--optim.warmup-epochs", "0", "--eval.every-epochs", "1")
    options = [*SMALL, "--nodes=1"]
    script = SCRIPTS / "pretrain_base.sh"
    job = cluster.submit(script, *TINY, *short, options=options, folder=tmp_path)
    cluster.wait(job, "COMPLETED")
    arguments = [*TINY, *short, "--model.img-size", "24", "--optim.lr", "1e-5"]
    job = cluster.submit(
        SCRIPTS / "finetune_classify.sh", "runs/transnext_base", *arguments, options=options,
        folder=tmp_path,
    )  # fmt: skip
    cluster.wait(job, "COMPLETED")
    run, tuned = tmp_path / "runs" / "transnext_base", tmp_path / "runs" / "transnext_pico_384"
    config = json.loads((tuned / "config.json").read_text())
    assert config["recipe"] == "classify"
    assert config["model"]["pretrain_size"] == 16
    last, first = lines(run, "train")[-1]["loss"], lines(tuned, "train")[0]["loss"]
    assert first < lines(run, "train")[0]["loss"]
    assert first == pytest.approx(last, abs=0.5)
