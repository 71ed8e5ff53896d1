"""What the configuration says of the data reaches the images."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from data.base import Shard
from tests.trainer.runs import tiny_config
from trainer.inputs import make_mixer, make_pipeline


def test_what_warping_uncovers_has_the_mean_colour_of_the_data(tmp_path):
    options = ("--data.auto-augment", "rand-m10-n1-p1", "--data.mean", "0.2", "0.4", "0.6")
    pipeline = make_pipeline(tiny_config(tmp_path, *options), torch.device("cpu"))
    with closing(pipeline.batches(pipeline.start(), Shard(rank=0, world_size=1))) as stream:
        batch, _ = next(stream)
    assert [51, 102, 153] in batch.images.reshape(-1, 3).tolist()


@pytest.mark.parametrize(
    ("policy", "jitter"), [(None, 0.4), ("3a", 0.4), ("rand-m9-mstd0.5-inc1", 0.0), ("v0", 0.0)]
)
def test_colours_are_jittered_where_timm_jitters_them(tmp_path, policy, jitter):
    options = ["--data.color-jitter", "0.4"]
    options += ["--data.auto-augment", policy] if policy else []
    mixer = make_mixer(tiny_config(tmp_path, *options))
    assert mixer.spec.color.strengths == (jitter, jitter, jitter, 0.0)
