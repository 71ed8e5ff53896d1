"""A run whose operators have their faster forms, in Triton's interpreter, learns as any other."""

from pathlib import Path

import pytest

from models.kernels.choice import force
from tests.dist import run_distributed
from tests.trainer.runs import losses, tiny_config, train

STEPS = 50
RUN = (
    "--model.name", "transnext_pico", "--model.img-size", "8",
    "--data.train", f"num_samples={STEPS},num_classes=10,size=20",
    "--data.val", "num_samples=1,num_classes=10,size=20",
    "--data.mixup", "0", "--data.cutmix", "0", "--train.batch-size", "1", "--eval.batch-size", "1",
    "--train.epochs", "1", "--eval.every-epochs", "1", "--optim.warmup-epochs", "0.3",
)  # fmt: skip


def train_in_both_forms(rank: int, world_size: int, configs: dict[str, str]) -> None:
    for form, config in configs.items():
        with force(form):
            train(rank, world_size, config)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_steps_lose_what_the_definitions_lose(tmp_path: Path):
    configs = {form: tiny_config(tmp_path / form, *RUN).to_json() for form in ("eager", "triton")}
    run_distributed(train_in_both_forms, 1, configs, timeout=800)
    expected = losses(tmp_path / "eager")
    assert len(expected) == STEPS
    assert losses(tmp_path / "triton") == pytest.approx(expected, abs=1e-4, rel=0)
