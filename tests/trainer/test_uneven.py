"""Processes among which a batch does not divide: each step computes the same all the same."""

import pytest

from tests.trainer.runs import train_named

SHORT = (
    "--train.epochs", "1", "--optim.warmup-epochs", "0.4", "--eval.every-epochs", "1",
    "--data.train", "num_samples=48,num_classes=10,size=20",
    "--train.accumulate", "2", "--backend.name",
)  # fmt: skip
BACKENDS = {"transnext_pico": "ddp", "transxnet_pico": "fsdp"}


@pytest.mark.slow
def test_losses_do_not_depend_on_whether_ranks_have_equally_many_images(tmp_path):
    """Six pairs a micro-batch are 1, 2, 1 and 2 among four ranks."""
    runs = {
        f"{model} on {world_size}": (world_size, [*SHORT, backend, "--model.name", model])
        for model, backend in BACKENDS.items()
        for world_size in (1, 4)
    }
    found = train_named(tmp_path, runs)
    for model in BACKENDS:
        loss, accuracy = found[f"{model} on 1"]
        others = found[f"{model} on 4"]
        assert len(loss) == 2
        assert others[0] == pytest.approx(loss, abs=1e-5)
        assert others[1] == pytest.approx(accuracy, abs=2.01)  # one image of 50 may tip over
