"""Which GPU a process takes, for every way of starting it."""

from __future__ import annotations

import pytest

from launcher.process import Process
from trainer.config import UserError
from trainer.group import gpu_index


def place(kind, local_rank):
    return Process(
        rank=local_rank, world_size=4, local_rank=local_rank, node=0,
        address="127.0.0.1", port=0, kind=kind,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "local_rank", "num_gpus", "index"),
    [
        ("single", 0, 1, 0),
        ("torchrun", 3, 4, 3),
        ("slurm", 3, 4, 3),
        ("slurm", 3, 1, 0),  # srun --gpus-per-task 1
    ],
)
def test_every_process_takes_a_gpu_of_its_own(kind, local_rank, num_gpus, index):
    assert gpu_index(place(kind, local_rank), num_gpus) == index


@pytest.mark.parametrize(("kind", "num_gpus"), [("torchrun", 1), ("slurm", 2)])
def test_more_processes_than_gpus_are_refused(kind, num_gpus):
    with pytest.raises(UserError, match=f"process 2 .* it sees {num_gpus}; start {num_gpus} per"):
        gpu_index(place(kind, 2), num_gpus)
