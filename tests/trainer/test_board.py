"""What a researcher sees of a run in TensorBoard, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.dist import run_distributed
from tests.trainer.board import photograph
from tests.trainer.runs import tiny_config, train


@pytest.mark.slow
@pytest.mark.browser
def test_loss_accuracy_and_inputs_are_drawn(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "--backend.name", "ddp", "--log.images", "4")
    run_distributed(train, 1, config.to_json())
    photograph(tmp_path / "run", tmp_path / "board.png")
    with Image.open(tmp_path / "board.png") as picture:
        assert len(picture.getcolors(maxcolors=1 << 24) or ()) > 500, "a picture with photographs"
