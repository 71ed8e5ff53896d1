"""Checkpoints on real gloo ranks: resharding, retention, damage, other models, full disks."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.dist import run_distributed
from tests.trainer.disk import on_small_disk
from trainer import manifest, shardfile
from trainer.checkpoint import Checkpointer, read_state
from trainer.config import UserError
from trainer.shares import whole

ROOT = Path(__file__).parents[2]
DIVIDED = ("weight/", "exp_avg/")
MODEL = "transnext_pico"
RECORD = {"state": {"step": 5, "cursor": {"samples": 120}}, "model": MODEL}


def whole_state(seed=0):
    """Shapes that no world size divides, fewer rows than ranks, and what is never divided."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 3), "b": (1, 4), "c": (7,), "d": (4, 2, 3)}
    state = {
        f"{kind}/{name}": torch.randn(shape, generator=generator)
        for kind in ("weight", "exp_avg")
        for name, shape in shapes.items()
    }
    state["buffer/mean"] = torch.randn(6, generator=generator)
    state["buffer/count"] = torch.tensor(2**40 + seed)
    state["step"] = torch.tensor(5.0 + seed)
    return state


def divided_state(world_size, state):
    """The same with weights and moments divided by their first dimension, as FSDP2 does."""
    mesh = init_device_mesh("cpu", (world_size,))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if name.startswith(DIVIDED) else tensor
        for name, tensor in state.items()
    }


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def fill(state, checkpointer, *, model=MODEL):
    """Fill `state` from the newest good checkpoint and return its record, None without one."""
    newest = checkpointer.newest(model=model)
    if newest is None:
        return None
    folder, record = newest
    read_state(folder, state, whole=True)
    return record


def load_whole(checkpointer, world_size):
    """Load into zeroed shares and return everything put together, with the record."""
    state = divided_state(world_size, zeros(whole_state()))
    record = fill(state, checkpointer)
    return {"state": {name: whole(tensor) for name, tensor in state.items()}, "record": record}


def save_load_and_lose_the_run(rank, world_size, root):
    """Save step 5 while the live tensors change, load it, be fenced off by a newer start."""
    checkpointer = Checkpointer(Path(root), dist.new_group(backend="gloo"), keep_last=9)
    live = divided_state(world_size, whole_state())
    checkpointer.save(live.items(), 5, RECORD, keep=None)
    for tensor in live.values():
        local(tensor).fill_(-1)
    checkpointer.wait()
    loaded = load_whole(checkpointer, world_size)

    staged = manifest.staging_folder(Path(root), 10, checkpointer.generation)
    if rank == 0:
        checkpointer.save(live.items(), 10, RECORD, keep=None)  # which waits for rank 1
        while not staged.exists():
            pass
        manifest.begin_generation(Path(root))
    dist.barrier()
    if rank == 1:
        checkpointer.save(live.items(), 10, RECORD, keep=None)
    fenced = [message_of(checkpointer.wait)]
    checkpointer.save(live.items(), 15, RECORD, keep=None)  # now it is stale from the start
    fenced.append(message_of(checkpointer.wait))
    return {"loaded": loaded, "fenced": fenced}


def message_of(action):
    """The UserError that `action` ends in."""
    try:
        action()
    except UserError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def written_by_two(tmp_path_factory):
    """A folder with the checkpoint of step 5 that two ranks wrote, and what they saw."""
    root = tmp_path_factory.mktemp("two") / "checkpoints"
    return root, run_distributed(save_load_and_lose_the_run, 2, str(root))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A gloo group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def load(root, group, state, *, model=MODEL):
    """Load as a new start of the run does."""
    return fill(state, Checkpointer(root, group, keep_last=9), model=model)


def save(checkpointer, *steps, keep=None):
    for step in steps:
        checkpointer.save(whole_state(step).items(), step, RECORD | {"step": step}, keep=keep)
    checkpointer.wait()


def steps_in(root):
    return [int(path.name.removeprefix("step_")) for path in manifest.checkpoints(root)]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_save_has_the_values_of_its_moment(written_by_two):
    for answer in written_by_two[1]:
        # That the live ones changed at once does not show.
        assert_equal(answer["loaded"]["state"], whole_state())
        assert answer["loaded"]["record"] == RECORD


def test_what_two_ranks_saved_is_loaded_by_one(written_by_two, alone):
    root, _ = written_by_two
    assert len(list((root / "step_0000000005").glob("*.safetensors"))) == 2
    state = zeros(whole_state())
    assert load(root, alone, state) == RECORD
    assert_equal(state, whole_state())
    state = zeros(whole_state())
    read_state(root / "step_0000000005", state)  # the way of exports: without a group
    assert_equal(state, whole_state())


def test_a_start_that_was_taken_for_dead_writes_nothing(written_by_two):
    root, answers = written_by_two
    for answer in answers:
        for message in answer["fenced"]:
            assert f"{root} belongs to start 2 of this run; this is start 1" in message
    assert steps_in(root) == [5]
    assert {path.name for path in root.iterdir()} == {"generation", "step_0000000005"}


def test_the_last_ones_and_the_best_are_kept(alone, tmp_path):
    checkpointer = Checkpointer(tmp_path, alone, keep_last=2)
    save(checkpointer, 5, 10, 15, 20, keep=5)
    assert steps_in(tmp_path) == [5, 15, 20]
    save(checkpointer, 25, keep=20)  # the best has moved on
    assert steps_in(tmp_path) == [20, 25]
    save(checkpointer, 30, 35)
    assert steps_in(tmp_path) == [30, 35]
    assert {path.name for path in tmp_path.iterdir()} == {
        "generation",
        "step_0000000030",
        "step_0000000035",
    }


def test_every_so_many_steps_one_is_kept_for_good(alone, tmp_path):
    save(Checkpointer(tmp_path, alone, keep_last=1, keep_every=10), 5, 10, 15, 20, 24, 25, keep=5)
    assert steps_in(tmp_path) == [5, 10, 20, 25]
    state = zeros(whole_state())
    assert load(tmp_path, alone, state) == RECORD | {"step": 25}


def test_a_run_without_a_checkpoint_begins(alone, tmp_path):
    state = whole_state()
    assert load(tmp_path / "new", alone, state) is None
    assert_equal(state, whole_state())


def test_the_format_before_is_named(alone, tmp_path):
    folder = manifest.staging_folder(tmp_path, 5, 0)
    folder.mkdir()
    save_file(whole_state(), folder / "shard-00001.safetensors")
    files = (manifest.describe(folder / "shard-00001.safetensors"),)
    folder = manifest.commit(
        tmp_path, manifest.Manifest(step=5, generation=0, files=files, record=RECORD)
    )
    message = message_of(lambda: load(tmp_path, alone, whole_state()))
    assert message.startswith(f"{folder} is a checkpoint in the format of an earlier version")


def test_a_save_that_takes_too_long_is_left_and_destroys_nothing(alone, tmp_path):
    checkpointer = Checkpointer(tmp_path, alone, keep_last=1)
    save(checkpointer, 5)
    disk, write = threading.Event(), shardfile.write

    def write_late(*arguments):
        disk.wait()
        return write(*arguments)

    with mock.patch.object(shardfile, "write", write_late):
        checkpointer.save(whole_state(10).items(), 10, RECORD, keep=None)
        assert not checkpointer.wait(0.01)
        assert manifest.newest_good(tmp_path) == (manifest.step_folder(tmp_path, 5), [])
        disk.set()
        assert checkpointer.wait()
    assert steps_in(tmp_path) == [10]


def truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    return path


def test_a_damaged_checkpoint_is_named_and_the_older_one_loaded(alone, tmp_path, capsys):
    save(Checkpointer(tmp_path, alone, keep_last=9), 5, 10)
    path = truncate(tmp_path / "step_0000000010")
    state = zeros(whole_state())
    record = load(tmp_path, alone, state)
    assert record == RECORD | {"step": 5}
    assert_equal(state, whole_state(5))
    said = capsys.readouterr().out
    assert said.startswith(f"warning: skipping a damaged checkpoint: {path} has ")
    assert said.count("\n") == 1


def test_a_damaged_later_one_never_displaces_a_good_one(alone, tmp_path):
    save(Checkpointer(tmp_path, alone, keep_last=9), 5, 10, 15)
    for step in (10, 15):
        truncate(manifest.step_folder(tmp_path, step))
    checkpointer = Checkpointer(tmp_path, alone, keep_last=1)
    assert checkpointer.newest(model=MODEL)
    save(checkpointer, 7)  # stopped by a signal, say
    state = zeros(whole_state())
    assert load(tmp_path, alone, state) == RECORD | {"step": 7}
    assert_equal(state, whole_state(7))


def test_where_all_are_damaged_there_is_no_silent_fresh_start(alone, tmp_path):
    save(Checkpointer(tmp_path, alone, keep_last=9), 5, 10)
    truncate(tmp_path / "step_0000000005")
    (tmp_path / "step_0000000010" / manifest.MANIFEST).unlink()
    message = message_of(lambda: load(tmp_path, alone, whole_state()))
    assert f"no checkpoint in {tmp_path} is whole" in message
    assert f"{tmp_path}/step_0000000010" in message
    assert "start anew" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"weight/a": torch.zeros(6, 3)},
            "it holds weight/a in shape (5, 3), the model has (6, 3)",
        ),
        ({"weight/e": torch.zeros(2)}, "it holds weight/e not at all, the model has (2,)"),
        ({"step": torch.zeros(1)}, "it holds step in shape (), the model has (1,)"),
        (
            {"buffer/count": torch.tensor(0.0)},
            "it holds buffer/count as I64 in place of torch.float32, the model has ()",
        ),
    ],
)
def test_tensors_of_another_shape_are_refused(alone, tmp_path, change, said):
    save(Checkpointer(tmp_path, alone, keep_last=9), 5)
    state = zeros(whole_state()) | change
    message = message_of(lambda: load(tmp_path, alone, state))
    folder = tmp_path / "step_0000000005"
    assert message == f"{folder} is a checkpoint of another model: {said}"
    assert all(not tensor.any() for tensor in state.values()), "nothing was loaded"


def test_a_checkpoint_that_holds_more_than_the_model_is_refused(alone, tmp_path):
    save(Checkpointer(tmp_path, alone, keep_last=9), 5)
    state = zeros(whole_state())
    del state["exp_avg/b"], state["weight/b"]
    message = message_of(lambda: load(tmp_path, alone, state))
    assert message.endswith("of another model: it holds exp_avg/b, the model does not")
    assert not any(tensor.any() for tensor in state.values()), "nothing was loaded"
    read_state(tmp_path / "step_0000000005", state)  # an export needs no moments
    assert torch.equal(state["weight/a"], whole_state(5)["weight/a"])


def test_a_checkpoint_of_another_model_is_refused_by_name(alone, tmp_path):
    save(Checkpointer(tmp_path, alone, keep_last=9), 5)
    message = message_of(lambda: load(tmp_path, alone, whole_state(), model="transxnet_pico"))
    folder = tmp_path / "step_0000000005"
    assert message == f"{folder} is a checkpoint of transnext_pico, not of transxnet_pico"


def save_on_nodes(rank, world_size, root):
    """Save by way of two nodes' disks, without reaching the run folder, and start again."""
    root, answers = Path(root), {}
    disks = {"kept": f"node{rank}", "lost": f"other{rank}" if rank else "node0"}
    for name, again in disks.items():
        folder = root / name / "checkpoints"

        def start(disk, folder=folder, name=name):
            group = dist.new_group(backend="gloo")
            return Checkpointer(folder, group, keep_last=9, local_dir=root / name / disk)

        checkpointer = start(f"node{rank}")
        live = divided_state(world_size, whole_state(5))
        checkpointer.save(live.items(), 5, RECORD | {"step": 5}, keep=None)
        checkpointer.wait()
        with mock.patch.object(manifest, "copy_durably", side_effect=OSError(5, "not in reach")):
            live = divided_state(world_size, whole_state(10))
            checkpointer.save(live.items(), 10, RECORD | {"step": 10}, keep=None)
            failed = message_of(checkpointer.wait)
        checkpointer = start(again)
        state = divided_state(world_size, zeros(whole_state()))
        record = fill(state, checkpointer)
        expected = divided_state(world_size, whole_state(record["step"]))
        equal = all(torch.equal(local(state[n]), local(t)) for n, t in expected.items())
        left = [str(path) for path in (root / name / again).rglob("*.safetensors")]
        answers[name] = [record["step"], equal, left, failed]
    return answers


def test_what_had_only_reached_the_nodes_disks_is_carried_over(tmp_path):
    for answer in run_distributed(save_on_nodes, 2, str(tmp_path)):
        for _, equal, left, failed in answer.values():
            assert equal
            assert left == []
            assert "step 10 could not be written" in failed
            assert "not in reach (rank 0)" in failed
        assert answer["kept"][0] == 10
        assert answer["lost"][0] == 5, "another node came in the place of the second"
    root = tmp_path / "kept" / "checkpoints"
    assert manifest.newest_good(root) == (manifest.step_folder(root, 10), [])


FILL_THE_DISK = """
import json, sys
from pathlib import Path

import torch
import torch.distributed as dist

from trainer import manifest
from trainer.checkpoint import Checkpointer
from trainer.config import UserError

root, store = map(Path, sys.argv[1:])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
checkpointer = Checkpointer(root, dist.new_group(backend="gloo"), keep_last=9)
small, large = {"w": torch.ones(1000)}, {"w": torch.ones(2_000_000)}
long = {"note": "x" * 2_000_000}
messages = []
for step, (state, record) in enumerate([(small, {}), (large, {}), (small, long), (small, {})]):
    checkpointer.save(state.items(), step, record, keep=None)
    try:
        checkpointer.wait()
    except UserError as error:
        messages.append(str(error))
        newest, skipped = manifest.newest_good(root)
        assert newest == manifest.step_folder(root, 0) and not skipped, (newest, skipped)
print(json.dumps([messages, sorted(path.name for path in root.iterdir())]))
"""


def test_a_full_disk_is_one_message_and_older_checkpoints_stay(tmp_path):
    root = tmp_path / "checkpoints"
    root.mkdir()
    command = [sys.executable, "-c", FILL_THE_DISK, str(root), str(tmp_path / "store")]
    done = subprocess.run(
        on_small_disk(root, command, num_bytes=1_000_000),
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    messages, left = json.loads(done.stdout)
    # First the tensors do not fit, then the manifest does not.
    for step, message in zip((1, 2), messages, strict=True):
        assert message.startswith(f"the checkpoint of step {step} could not be written to {root}: ")
        assert "No space left on device" in message
        assert "older checkpoints are intact" in message
    assert left == ["generation", "step_0000000000", "step_0000000003"]
