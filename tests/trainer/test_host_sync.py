"""The hot path never waits for the device: no step reads a value of a tensor."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.dist import run_distributed
from tests.trainer.runs import tiny_config, train
from trainer.signals import Signals

READS = (
    *("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"),
    *("__contains__", "equal", "allclose", "is_nonzero", "unique", "masked_select", "__format__"),
)
WAYS = {
    "ddp": ["--backend.name", "ddp", "--train.precision", "bf16"],
    "fsdp": ["--backend.name", "fsdp", "--memory.checkpointing", "full"],
}


class HostReads(TorchFunctionMode):
    """Counts by line of code what would make a GPU wait.

    Integers are left aside: a batch's ids and positions, its pixels on their way to the device, and
    what ranks tell one another stay on the CPU everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        value = args[0] if args else None
        is_read = getattr(func, "__name__", "") in READS and isinstance(value, Tensor)
        if is_read and value.dtype not in (torch.int64, torch.uint8):
            self.counts[_caller()] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    frame = traceback.extract_stack(limit=4)[0]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_more_steps_make_no_more_reads(way, tmp_path):
    few, many = (
        _config(tmp_path / name, epochs, WAYS[way]) for name, epochs in (("a", 2), ("b", 6))
    )
    ((short, long),) = run_distributed(_count_reads, 1, [few, many])
    assert short, "the log's values are read, so the counting works"
    grown = {line: count for line, count in long.items() if count > short.get(line, 0)}
    assert not grown


def _config(folder: Path, epochs: int, arguments: list[str]) -> str:
    settings = ["--train.epochs", str(epochs), "--optim.warmup-epochs", "1", "--log.every", "99"]
    settings += ["--eval.every-epochs", str(epochs), "--checkpoint.every", "99"]
    settings += ["--train.accumulate", "2", "--optim.clip-grad", "1"]
    return tiny_config(folder, *settings, *arguments).to_json()


def _count_reads(rank: int, world_size: int, configs: list[str]) -> list[dict[str, int]]:
    found = []
    # The vote on stopping is cast and read between the hosts alone.
    with mock.patch.object(Signals, "agree", return_value=False):
        for config in configs:
            with HostReads() as reads:
                train(rank, world_size, config)
            found.append(dict(reads.counts))
    return found
