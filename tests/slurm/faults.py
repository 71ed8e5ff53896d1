"""Faults at random: `python -m tests.slurm.faults --runs 20 [--seed N]`.

Job after job trains a small run on a cluster in this machine. Every run is disturbed twice, each
time after it has saved something new; it has to complete, with every image shown once an epoch and
the losses of a run that nobody disturbed. Prints a tally and fails if a run was lost.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from launcher.starts import Start, Starts
from tests.slurm.cluster import NODES, Cluster, missing, wait_until
from tests.slurm.runs import assert_same_run, run_of, submit, wait_for_checkpoint, wait_for_start
from tests.trainer.runs import losses


class Disturbance:
    """A running job, the start that it is at, and what may happen to it."""

    def __init__(self, cluster: Cluster, job: int, start: Start, draw: random.Random) -> None:
        self.cluster = cluster
        self.job = job
        self.start = start
        self.node = draw.choice(start.nodes)

    def time_limit(self) -> None:
        self.cluster.run("scancel", "--batch", "--signal=USR1", str(self.job))

    def rank_killed(self) -> None:
        for process in self.cluster.workers(self.node)[:1]:
            process.kill()

    def srun_killed(self) -> None:
        for process in self.cluster.processes(self.start.nodes[0], "srun", "--export=ALL"):
            process.kill()

    def power_cut(self) -> None:
        self.cluster.cut_power(self.node)
        self.cluster.declare(self.node, "down")

    def slurmd_lost(self) -> None:
        self.cluster.kill_slurmd(self.node)
        self.cluster.declare(self.node, "down")

    def preempted(self) -> None:
        script = self.cluster.folder / "other.sh"
        script.write_text("#!/bin/sh\nexit 0\n")
        options = ["--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null"]
        self.cluster.submit(script, options=options, folder=self.cluster.folder)

    def controller_crashed_at_time_limit(self) -> None:
        self.time_limit()
        self.cluster.crash_controller()


FAULTS: tuple[Callable[[Disturbance], None], ...] = (
    Disturbance.time_limit,
    Disturbance.rank_killed,
    Disturbance.srun_killed,
    Disturbance.power_cut,
    Disturbance.slurmd_lost,
    Disturbance.preempted,
    Disturbance.controller_crashed_at_time_limit,
)


def disturb(cluster: Cluster, folder: Path, draw: random.Random) -> list[str]:
    """Run a job that is disturbed twice to its end and return what was done to it."""
    run = run_of(folder)
    partition = draw.choice(["low", "graceful"])
    options = (f"--partition={partition}", "--nodes=2", "--exclusive")
    job = submit(cluster, folder, options=options)
    done: list[str] = []
    for number in (1, 2):
        wait_for_start(cluster, job, run, number)
        start = Starts(run).read()[0][-1]
        wait_for_checkpoint(cluster, job, run, beyond=start.step)
        fault = draw.choice(FAULTS)
        done.append(fault.__name__)
        fault(Disturbance(cluster, job, start, draw))
        wait_until(lambda: _is_going_on(cluster, job, run, number), "what follows")  # noqa: B023
        if cluster.state(job) == "COMPLETED":
            break  # it was faster than the fault
    cluster.wait(job, "COMPLETED")
    return done


def _is_going_on(cluster: Cluster, job: int, run: Path, number: int) -> bool:
    return len(Starts(run).read()[0]) > number or cluster.state(job) == "COMPLETED"


def repair(cluster: Cluster) -> None:
    """Switch all nodes off and on again."""
    for node in NODES:
        cluster.cut_power(node)
        cluster.declare(node, "down")
        cluster.start(node)
    for node in NODES:
        cluster.declare(node, "resume")


def main() -> int:
    """Disturb runs and print how they ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if why := missing():
        print(f"error: {why}", file=sys.stderr)
        return 2
    tally: Counter[str] = Counter()
    lost = 0
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    with Cluster() as cluster:
        quiet = folder / "undisturbed"
        quiet.mkdir()
        cluster.wait(submit(cluster, quiet, options=("--nodes=2",)), "COMPLETED")
        reference = losses(run_of(quiet))
        for number in range(options.runs):
            place = folder / str(number)
            place.mkdir()
            begin = time.monotonic()
            try:
                done = disturb(cluster, place, random.Random(f"{options.seed} {number}"))
                assert_same_run(run_of(place), reference)
                tally.update(done)
                print(f"run {number}: {', '.join(done)}: whole, ", end="")
            except AssertionError:
                lost += 1
                traceback.print_exc()
                print(f"run {number}: LOST, see {place}, ", end="")
            print(f"{time.monotonic() - begin:.0f} s", flush=True)
            repair(cluster)
    print(f"{options.runs} runs, {lost} lost; faults: {dict(tally)}")
    if not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
