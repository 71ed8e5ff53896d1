"""Shares: what one layout saved any other loads, every number written once, in little memory."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.dist import run_distributed
from trainer import manifest
from trainer.checkpoint import Checkpointer, read_state
from trainer.shardfile import Box

# By name: the mesh, whose size is the number of processes, and how weights lie on it.
LAYOUTS = {
    "ddp 1": ((1,), None),
    "ddp 2": ((2,), None),
    "ddp 4": ((4,), None),
    "fsdp 1": ((1,), [Shard(0)]),
    "fsdp 2": ((2,), [Shard(0)]),
    "fsdp 3": ((3,), [Shard(0)]),
    "fsdp 4": ((4,), [Shard(0)]),
    "hsdp 2x2": ((2, 2), [Replicate(), Shard(0)]),
    "fsdp 2x2": ((2, 2), [Shard(0), Shard(0)]),
    "columns 4": ((4,), [Shard(1)]),
}
RECORD = {"model": "transnext_pico"}


def whole_state():
    """Shapes that no world size divides, rows fewer than ranks, several types, averages, buffers.

    All but buffers and step are divided by FSDP.
    """
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (5, 3), "b": (1, 4), "c": (7, 9), "d": (4, 2, 3), "e": (130, 17)}
    state = {
        f"{kind}/{name}": torch.randn(shape, generator=generator)
        for kind in ("weight", "exp_avg", "exp_avg_sq", "ema")
        for name, shape in shapes.items()
    }
    state["weight/half"] = torch.randn(6, 5, generator=generator).bfloat16()
    state["buffer/mean"] = torch.randn(6, generator=generator)
    state["buffer/count"] = torch.tensor(2**40 + 1)
    state["buffer/seen"] = torch.tensor([True, False, True])
    state["ema/mean"] = torch.randn(6, generator=generator)
    return state | {"step": torch.tensor(5.0, dtype=torch.float64)}


def laid_out(state, layout, mesh):
    """The state as a backend of that layout holds it."""
    placements = LAYOUTS[layout][1]
    return {
        name: tensor
        if placements is None or name.startswith("buffer/") or tensor.dim() < 2
        else distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        for name, tensor in state.items()
    }


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def move(rank, world_size, root):
    """Save in every layout, load each in all of them; return (moves made, what was not equal)."""
    mine, groups, states = [], {}, {}
    for layout, (shape, _) in LAYOUTS.items():
        size = math.prod(shape)
        groups[layout] = dist.new_group(range(size), backend="gloo")
        mesh = DeviceMesh("cpu", torch.arange(size).view(shape))
        if rank < size:
            mine.append(layout)
            states[layout] = laid_out(whole_state(), layout, mesh)
            checkpointer = Checkpointer(Path(root) / layout, groups[layout], keep_last=9)
            checkpointer.save(states[layout].items(), 5, RECORD, keep=None)
            checkpointer.wait()
    dist.barrier()
    wrong, count = [], 0
    for after in mine:
        for before in LAYOUTS:
            state = {name: torch.zeros_like(tensor) for name, tensor in states[after].items()}
            checkpointer = Checkpointer(Path(root) / before, groups[after], keep_last=9)
            folder, record = checkpointer.newest(model="transnext_pico")
            assert record == RECORD
            read_state(folder, state, whole=True)
            count += 1
            for name, tensor in states[after].items():
                if not torch.equal(local(state[name]), local(tensor)):
                    wrong.append(f"{name} of {before} in {after}")
    return [count, wrong]


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A folder with a checkpoint that every layout wrote, and what each rank says of the moves."""
    root = tmp_path_factory.mktemp("layouts")
    return root, run_distributed(move, 4, str(root))


def test_whatever_layout_saved_it_any_other_loads_the_same_bits(moved):
    sizes = [math.prod(shape) for shape, _ in LAYOUTS.values()]
    here = [sum(size > rank for size in sizes) for rank in range(4)]
    assert moved[1] == [[count * len(LAYOUTS), []] for count in here]


def test_every_rank_writes_its_share_and_nothing_twice(moved):
    expected = whole_state()
    for layout, (shape, _) in LAYOUTS.items():
        folder = manifest.step_folder(moved[0] / layout, 5)
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == math.prod(shape)
        # Any reader of safetensors sees the pieces.
        pieces = [load_file(path) for path in files]
        for name, tensor in expected.items():
            written = [file[name] for file in pieces if name in file]
            assert sum(piece.numel() for piece in written) == tensor.numel(), (layout, name)
            assert all(piece.dtype == tensor.dtype for piece in written)
        sizes = [sum(piece.nbytes for piece in file.values()) for file in pieces]
        if layout != "columns 4":  # of which a tensor of few columns leaves the last one little
            assert max(sizes) < 1.25 * sum(sizes) / len(sizes), (layout, sizes)


def test_nothing_in_a_checkpoint_is_pickled(moved):
    for path in manifest.step_folder(moved[0] / "hsdp 2x2", 5).iterdir():
        assert path.suffix in (".safetensors", ".json")
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
            continue
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        assert len(content) == 8 + length + max(ends)


@given(
    sizes=st.lists(st.integers(1, 9), max_size=3),
    counts=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_shares_put_together_are_the_whole(sizes, counts):
    """And so are shares of shares, as where a shard is held by several ranks."""
    whole = Box.whole(sizes)
    seen = torch.zeros(sizes, dtype=torch.int64)
    for index in range(counts[0]):
        part = whole.share(index, counts[0])
        for second in range(counts[1] if part else 0):
            box = part.share(second, counts[1])
            if box is not None:
                seen[box.within(whole)] += 1
                assert seen[box.within(whole)].numel() == box.num_elements
                assert box.overlap(whole) == box.overlap(box) == box
    assert (seen == 1).all()


def test_boxes_that_do_not_touch_have_nothing_in_common():
    box = Box((0, 4), (3, 2))
    assert box.overlap(Box((3, 4), (1, 2))) is None
    assert box.overlap(Box((2, 0), (2, 5))) == Box((2, 4), (1, 1))


LARGE, COUNT = (512, 1024), 48  # 2 MiB each, 96 MiB in all


def peak_of_saves(rank, world_size, root):
    """The highest resident memory over two saves, and that before them, in bytes."""
    checkpointer = Checkpointer(Path(root), dist.new_group(backend="gloo"), keep_last=1)
    # Made one by one, as by a backend that has to gather each.
    checkpointer.save(iter([("w", torch.ones(2))]), 1, RECORD, keep=None)
    checkpointer.wait()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for step in (2, 3):
        state = ((f"w{i}", torch.full(LARGE, float(i))) for i in range(COUNT))
        checkpointer.save(state, step, RECORD, keep=None)
    checkpointer.wait()
    return resident("VmHWM") - before


def resident(field):
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_a_save_takes_little_more_memory_than_a_ranks_share(tmp_path):
    share = COUNT * math.prod(LARGE) * 4 / 2
    for peak in run_distributed(peak_of_saves, 2, str(tmp_path)):
        assert 0.9 * share < peak < 1.5 * share
