"""The checks on the nodes of a real Slurm cluster, one of which may hang or be out of reach."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launcher.rundir import CODE
from tests.slurm.cluster import wait_until

pytestmark = pytest.mark.slow

# No GPU: those of the cluster are none.
SCRIPT = f"""#!/bin/sh
export CUDA_VISIBLE_DEVICES= PYTHONPATH='{CODE}' PYTHONSAFEPATH=1 OMP_NUM_THREADS=1
exec '{sys.executable}' -m launcher preflight transnext_micro --model.name transnext_pico "$@"
"""


def submit(cluster, folder: Path, *arguments: str, nodes: int) -> int:
    script = folder / "preflight.sh"
    script.write_text(SCRIPT)
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", "--output=said.txt"]
    return cluster.submit(script, *arguments, options=options, folder=folder)


def test_four_nodes_are_checked_together(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--seconds", "400", "--json", "rows.json", nodes=4)
    cluster.wait(job, "COMPLETED", "FAILED")
    said = (tmp_path / "said.txt").read_text()
    assert said.splitlines()[-1] == "4 nodes are fit", said
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    seen = {row["check"]: row["value"] for row in rows}
    assert seen["shared run folder"] == "seen"
    links = {(row["host"], row["where"]) for row in rows if row["check"] == "link"}
    assert links == {(f"node{a}", f"to node{b}") for a, b in ((1, 2), (2, 3), (3, 4), (4, 1))}


def test_a_node_whose_checks_hang_is_named_and_the_others_are_not(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--seconds", "100", nodes=3)
    held = []
    wait_until(lambda: held.extend(cluster.processes("node2", "trainer.preflight")) or held, "it")
    for process in held:
        process.suspend()
    cluster.wait(job, "COMPLETED", "FAILED")
    said = (tmp_path / "said.txt").read_text()
    assert said.splitlines()[-1] == "bad nodes: --exclude=node2", said
    # Slurm has ended what hung, so that the next step has its CPUs.
    wait_until(lambda: not cluster.processes("node2", "trainer.preflight"), "its end")


def test_a_node_that_slurm_cannot_reach_is_named(cluster, tmp_path):
    cluster.kill_slurmd("node3")
    job = submit(cluster, tmp_path, "--seconds", "400", nodes=4)
    cluster.wait(job, "COMPLETED", "FAILED")
    said = (tmp_path / "said.txt").read_text()
    assert said.splitlines()[-1] == "bad nodes: --exclude=node3", said
    assert "Slurm has lost it" in said
