"""The losses of short runs, kept byte for byte: a change that is to compute the same, does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "tests" / "goldens" / "losses.json"


@pytest.mark.slow
def test_losses_are_the_golden_ones(tmp_path):
    kept = json.loads(KEPT.read_text())
    path = tmp_path / "losses.json"
    command = [sys.executable, "-m", "tests.goldens", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300, stdout=subprocess.DEVNULL)
    [(processor, found)] = json.loads(path.read_text()).items()
    advice = (
        "a run computes something else than it did: if that is meant, record the losses again "
        "with python -m tests.goldens tests/goldens/losses.json"
    )
    if processor in kept:
        assert found == kept[processor], advice
    for curves in kept.values():  # other processors round otherwise, and no more than that
        assert {
            model: pytest.approx(curve, rel=2e-6) for model, curve in curves.items()
        } == found, advice
