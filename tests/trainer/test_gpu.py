"""Training on a GPU, by NCCL: a run of the CPU goes on there, and so does one that was killed."""

from __future__ import annotations

import pytest
import torch

from launcher import rundir
from launcher.local import launch
from tests.trainer.runs import copy_checkpoint, kill_at_a_checkpoint, lines, losses, tiny_config

MODELS = ("transnext_pico", "transxnet_pico")
WAYS = {
    "ddp": ["--backend.name", "ddp"],
    "fsdp": ["--backend.name", "fsdp", "--memory.checkpointing", "full"],
    "kept": ["--backend.name", "fsdp", "--backend.reshard", "no", "--backend.prefetch", "2"],
    "selective": ["--backend.name", "ddp", "--memory.checkpointing", "selective"],
    "on the host": ["--backend.name", "ddp", "--memory.offload-activations"],
    "zero1": ["--backend.name", "zero1"],
    "zero3": ["--backend.name", "zero3", "--memory.checkpointing", "1"],
    "zero3 on the host": ["--backend.name", "zero3", "--backend.offload", "all"],
    "compiled": ["--backend.name", "fsdp", "--memory.compile"],
    "bf16": ["--train.precision", "bf16", "--backend.name", "fsdp", "--memory.checkpointing", "1"],
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu"),
]


@pytest.fixture(scope="module", params=MODELS)
def on_cpu(request, tmp_path_factory):
    """The model's name, and the folder of a run of it on the CPU."""
    folder = tmp_path_factory.mktemp("cpu")
    config = tiny_config(folder, "--model.name", request.param, "--train.epochs", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert launch(rundir.prepare(config), num_processes=1) == 0
    return request.param, folder


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_on_from_the_cpu(way, on_cpu, tmp_path):
    model, before = on_cpu
    config = tiny_config(tmp_path, "--model.name", model, "--train.epochs", "2", *WAYS[way])
    run_dir = rundir.prepare(config)
    copy_checkpoint(before, run_dir, step=5)
    assert launch(run_dir, num_processes=1) == 0
    expected = {step: loss for step, loss in losses(before).items() if step > 5}
    assert losses(run_dir) == pytest.approx(expected, abs=2e-2 if way == "bf16" else 1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_after_sigkill_it_goes_on(model, tmp_path):
    arguments = ["--model.name", model, "--backend.name", "fsdp", "--train.precision", "bf16"]
    whole = rundir.prepare(tiny_config(tmp_path / "whole", *arguments))
    assert launch(whole, num_processes=1) == 0
    killed = rundir.prepare(tiny_config(tmp_path / "killed", *arguments))
    kill_at_a_checkpoint(killed, num_processes=1)
    assert launch(killed, num_processes=1) == 0
    starts = [line["step"] for line in lines(killed, "start")]
    assert starts[1] in (5, 10, 15), "it went on from a checkpoint in the middle"
    assert losses(killed) == pytest.approx(losses(whole), abs=2e-2)
