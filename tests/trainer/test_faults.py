"""Some of the faults of tests.trainer.faults, a few of each kind: no run is lost."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.trainer.faults import DAMAGES, SCENARIOS, on_its_disk

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_no_fault_in_a_save_loses_a_run(tmp_path):
    done = subprocess.run(
        on_its_disk(tmp_path, stride=9), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *tally, total = done.stdout.splitlines()
    tried = {kind: int(count) for count, kind in (line.split(maxsplit=1) for line in tally)}
    assert {*tried} == {*(s.name for s in SCENARIOS), *DAMAGES, "a full disk"}
    assert min(tried.values()) >= 2
    assert re.fullmatch(rf"{sum(tried.values())} faults, 0 lost runs", total)
