from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.dist import RankError, run_distributed


def _sum(rank, world_size, scale):
    value = torch.tensor([float(rank + 1) * scale])
    dist.all_reduce(value)
    return {"sum": value, "rank": rank, "threads": torch.get_num_threads()}


def _fail_on_one(rank, world_size):
    if rank == 1:
        raise KeyError("the culprit")
    dist.barrier()  # the other rank waits for it


def _abort_after_result(rank, world_size):
    if rank == 0:
        dist.destroy_process_group = os.abort  # where gloo does it: in the shutdown
    return rank


def _abort_before_result(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGABRT)
    return rank


def _hang(rank, world_size):
    if rank == 0:
        signal.pause()


def test_ranks_talk_to_each_other_and_answer_in_order():
    results = run_distributed(_sum, 3, 10.0)
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert [result["sum"].item() for result in results] == [60.0] * 3
    assert {result["threads"] for result in results} == {1}


def test_the_failing_rank_is_named_with_its_traceback():
    with pytest.raises(RankError, match=r"rank_1 failed:(.|\n)*_fail_on_one(.|\n)*the culprit"):
        run_distributed(_fail_on_one, 2)


def test_an_abort_is_forgiven_only_after_the_result():
    assert run_distributed(_abort_after_result, 2) == [0, 1]
    with pytest.raises(RankError, match="rank 1 ended with exit code -6"):
        run_distributed(_abort_before_result, 2)


def test_a_hang_ends_with_a_timeout():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_distributed(_hang, 2, timeout=8.0)
