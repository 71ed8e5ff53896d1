"""What the configuration says of the data reaches the images."""

from __future__ import annotations

from contextlib import closing

import torch

from data.base import Shard
from tests.trainer.runs import tiny_config
from trainer.inputs import make_pipeline


def test_what_warping_uncovers_has_the_mean_colour_of_the_data(tmp_path):
    options = ("--data.auto-augment", "rand-m10-n1-p1", "--data.mean", "0.2", "0.4", "0.6")
    pipeline = make_pipeline(tiny_config(tmp_path, *options), torch.device("cpu"))
    with closing(pipeline.batches(pipeline.start(), Shard(rank=0, world_size=1))) as stream:
        batch, _ = next(stream)
    assert [51, 102, 153] in batch.images.reshape(-1, 3).tolist()
