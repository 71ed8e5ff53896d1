"""Progressive resolution: images grow by the epoch, on every backend alike."""

import pytest
import torch

from data.base import Shard
from tests.trainer.runs import tiny_config, train_named
from trainer.config import UserError
from trainer.inputs import make_pipeline

SIZES = ("--train.progressive", "0:8,1:20,2:16", "--train.epochs", "3", "--eval.every-epochs", "1")


@pytest.mark.slow
def test_a_run_whose_images_grow_is_the_same_on_every_backend(tmp_path):
    named = {
        f"{model}, {backend}": (
            world_size,
            [*SIZES, "--backend.name", backend, "--model.name", model],
        )
        for model in ("transnext_pico", "transxnet_pico")
        for backend, world_size in (("ddp", 1), ("fsdp", 2))
    }
    found = train_named(tmp_path, named)
    for model in ("transnext_pico", "transxnet_pico"):
        losses, accuracies = found[f"{model}, ddp"]
        assert len(losses) == 15
        assert len(accuracies) == 6
        assert found[f"{model}, fsdp"][0] == pytest.approx(losses, abs=1e-5)


def test_each_epoch_has_its_size(tmp_path):
    pipeline = make_pipeline(tiny_config(tmp_path, *SIZES), torch.device("cpu"))
    stream = pipeline.batches(pipeline.start(), Shard(rank=0, world_size=1))
    shapes = {}
    for batch, cursor in stream:
        shapes.setdefault(batch.epoch, set()).add(tuple(batch.images.shape[1:3]))
        if cursor.epoch == 3:
            break
    stream.close()
    assert shapes == {0: {(8, 8)}, 1: {(20, 20)}, 2: {(16, 16)}}


@pytest.mark.parametrize("text", ["8", "1:8", "0:8,0:16", "0:8,4:16,2:20", "0:0", "0:8,"])
def test_a_schedule_that_makes_no_sense_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"train.progressive is .*such as 0:128,100:176"):
        tiny_config(tmp_path, "--train.progressive", text)
