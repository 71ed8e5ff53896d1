"""The watchdog: a run in which a rank gets stuck ends, and says which rank and where."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from launcher.process import Failure
from tests.dist import RankError, run_distributed
from trainer.control import Control
from trainer.watchdog import Watchdog

SECONDS = 4.0  # long enough for threads that a busy machine lets wait


def get_stuck(rank, world_size, folder, who, how):
    """All ranks meet twice; one of them never comes to the second meeting."""
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    watchdog = Watchdog(Control(folder, generation=1), seconds=SECONDS)
    watchdog.at("computing")
    dist.barrier()
    watchdog.started()
    if rank == who:
        watchdog.at("waiting for data")
        if how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait()
    watchdog.at("waiting for data")
    watchdog.at("computing")
    dist.barrier()


@pytest.mark.parametrize(
    ("who", "how", "said"),
    [
        (1, "waits", "rank 1 on node1 (waiting for data) got stuck"),
        (2, "stops", "rank 2 on node2"),
        (0, "stops", "rank 0 on node0"),
    ],
)
def test_the_rank_that_others_wait_for_is_named(tmp_path, who, how, said):
    (tmp_path / "logs").mkdir()
    with pytest.raises(RankError, match="ended with exit code 76"):
        run_distributed(get_stuck, 3, tmp_path, who, how)
    failure = Failure.read(tmp_path)
    assert (failure.code, failure.node) == (76, f"node{who}"), "for the scheduler to leave out"
    assert said in failure.message
    assert ("does not answer" in failure.message) == (how == "stops")
    assert failure.message.startswith("no progress for 4 seconds: ")


def move_on(rank, world_size, folder):
    """Take longer than the limit, but for no single thing."""
    watchdog = Watchdog(Control(folder, generation=1), seconds=SECONDS)
    watchdog.started()
    begin, seconds = time.monotonic(), torch.zeros(())
    while seconds < 1.5 * SECONDS:
        watchdog.at("computing")
        seconds.fill_(time.monotonic() - begin)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    watchdog.close()
    return [thread.name for thread in threading.enumerate()]


def test_a_slow_run_that_moves_on_is_left_alone(tmp_path):
    (tmp_path / "logs").mkdir()
    names = run_distributed(move_on, 2, tmp_path)
    assert "foveate-watchdog" not in [name for rank in names for name in rank]
