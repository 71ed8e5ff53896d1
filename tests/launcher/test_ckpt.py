"""`foveate ckpt`: what it lists, finds, compares and removes; every mistake in one line."""

import os
import re

import numpy as np
import pytest

from launcher.__main__ import main
from tests.launcher.test_front_door import assert_user_error, foveate
from trainer import manifest, shardfile
from trainer.shardfile import Box, Piece

DTYPES = {"float32": "F32", "int64": "I64", "bool": "BOOL", "uint16": "BF16"}


def tensors(step):
    """Named arrays of all kinds; uint16 has the bits of bfloat16."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
    return {
        "weight/a": weight,
        "weight/half": np.array([0x3F80, 0xC000, 0x3F00], np.uint16),  # 1, -2, 0.5
        "buffer/count": np.array(step, np.int64),
        "buffer/seen": np.array([True, False]),
    }


def commit(run_dir, step, values, *, num_files=1, best=None):
    """Make a checkpoint as that many processes do."""
    root = run_dir / "checkpoints"
    generation = manifest.begin_generation(root)
    staged = manifest.staging_folder(root, step, generation)
    staged.mkdir()
    files = []
    for rank in range(num_files):
        pieces = []
        for name, value in values.items():
            whole = Box.whole(value.shape)
            box = whole.share(rank, num_files)
            if box is not None:
                piece = Piece(name, DTYPES[str(value.dtype)], value.shape, box)
                data = np.ascontiguousarray(value[box.within(whole)]).reshape(-1)
                pieces.append((piece, data.view(np.uint8).data))
        files.append(shardfile.write(staged / f"rank_{rank:05d}.safetensors", pieces))
    record = {"state": {"step": step, "best_step": best}, "backend": "fsdp", "model": "m"}
    return manifest.commit(
        root,
        manifest.Manifest(step=step, generation=generation, files=tuple(files), record=record),
    )


def alter(folder):
    """Change a byte of the data."""
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def run_dir(tmp_path):
    for step in (5, 10, 15):
        commit(tmp_path, step, tensors(step), num_files=step // 5, best=10)
    return tmp_path


def test_ls_shows_what_there_is(run_dir):
    (run_dir / "checkpoints" / "step_0000000005" / manifest.MANIFEST).unlink()
    folder = manifest.step_folder(run_dir / "checkpoints", 15)
    then = folder.stat().st_mtime - 3 * 3600
    os.utime(folder, (then, then))
    done = foveate("ckpt", "ls", str(run_dir))  # where torch and numpy cannot be imported
    assert (done.returncode, done.stderr) == (0, "")
    rows = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    assert rows[0] == ["step", "size", "age", "state", "written by"]
    assert [[row[0], *row[3:]] for row in rows[1:]] == [
        ["5", "damaged"],
        ["10", "good, best", "fsdp on 2, start 2"],
        ["15", "good", "fsdp on 3, start 3"],
    ]
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert rows[3][1:3] == [f"{size / 1000:.3g} kB", "3 h"]


def test_ls_compares_sizes(run_dir, capsys):
    folder = manifest.step_folder(run_dir / "checkpoints", 15)
    with (folder / "rank_00000.safetensors").open("ab") as file:
        file.write(b"x")
    assert main(["ckpt", "ls", str(run_dir)]) == 0
    assert re.search(r"15 .* damaged +fsdp on 3, start 3\n", capsys.readouterr().out)


def test_verify_hashes_everything(run_dir, capsys):
    assert main(["ckpt", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out == "step 5: good\nstep 10: good\nstep 15: good\n"
    folder = manifest.step_folder(run_dir / "checkpoints", 10)
    alter(folder)
    done = foveate("ckpt", "verify", str(run_dir))
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[0::2] == ["step 5: good", "step 15: good"]
    assert lines[1] == f"step 10: {folder / 'rank_00000.safetensors'} does not match its hash"
    assert done.stderr.count("\n") == 1
    assert f"foveate ckpt rm {run_dir} 10 removes them" in done.stderr


def test_diff_does_not_see_how_many_wrote_it(tmp_path, capsys):
    one = commit(tmp_path / "one", 5, tensors(5))
    commit(tmp_path / "two", 5, tensors(5), num_files=3)
    assert main(["ckpt", "diff", str(one), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out.startswith("0 of 4 tensors differ: ")


def test_diff_names_what_differs_and_by_how_much(tmp_path, capsys):
    before, after = tensors(5), tensors(9)
    after["weight/a"] = before["weight/a"].copy()
    after["weight/a"][3, 1] += 0.5
    after["weight/a"][0, 0] -= 0.25
    after["weight/half"] = np.array([0x3F80, 0xC040, 0x3F00], np.uint16)  # -3 in place of -2
    after["buffer/seen"] = np.array([True, False, False])
    after["weight/new"] = np.zeros(2, np.float32)
    commit(tmp_path, 5, before)
    second = commit(tmp_path, 9, after, num_files=2)
    first = manifest.step_folder(tmp_path / "checkpoints", 5)
    assert main(["ckpt", "diff", str(first), str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "buffer/count  max |difference| 4 in 1 of 1 numbers",
        "buffer/seen  BOOL [2] against BOOL [3]",
        "weight/a  max |difference| 0.5 in 2 of 12 numbers",
        "weight/half  max |difference| 1 in 1 of 3 numbers",
        "weight/new  nothing against F32 [2]",
        f"5 of 5 tensors differ: {first} and {second}",
    ]


def test_diff_takes_no_damaged_one(run_dir, capsys):
    folder = manifest.step_folder(run_dir / "checkpoints", 15)
    alter(folder)
    assert main(["ckpt", "diff", str(folder), str(run_dir)]) == 2
    assert "neither a run folder nor a whole checkpoint: " in capsys.readouterr().err


def test_rm_removes_and_leaves_a_good_one(run_dir):
    done = foveate("ckpt", "rm", str(run_dir), "5", "10")
    assert (done.returncode, done.stderr) == (0, "")
    (left,) = manifest.checkpoints(run_dir / "checkpoints")
    assert left.name == "step_0000000015"
    assert_user_error(foveate("ckpt", "rm", str(run_dir), "15"), "no good checkpoint", "--force")
    assert manifest.damage(left) == []
    assert main(["ckpt", "rm", str(run_dir), "15", "--force"]) == 0
    assert manifest.checkpoints(run_dir / "checkpoints") == []


def test_what_is_damaged_is_no_good_one_left(run_dir, capsys):
    for step in (5, 10):
        alter(manifest.step_folder(run_dir / "checkpoints", step))
    assert main(["ckpt", "rm", str(run_dir), "15"]) == 2
    assert main(["ckpt", "rm", str(run_dir), "5", "10"]) == 0
    assert "would be left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls", "{}/nowhere"], "nowhere has no checkpoints: give a run folder"),
        (["verify", "{}/nowhere"], "nowhere has no checkpoints: give a run folder"),
        (["diff", "{}", "{}/nowhere"], "nowhere is neither a run folder nor a whole checkpoint"),
        (["rm", "{}", "7"], "has no checkpoint of step 7 (it has 5, 10, 15)"),
        (["rm", "{}"], "STEP"),
        (["rm", "{}", "seven"], "invalid int value: 'seven'"),
        (["list", "{}"], "invalid choice: 'list'"),
    ],
)
def test_mistakes_are_one_line(run_dir, capsys, arguments, said):
    assert main(["ckpt", *(argument.format(run_dir) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_help_names_every_action(capsys):
    for arguments in ([], ["--help"], ["ls", "-h"]):
        assert main(["ckpt", *arguments]) == 0
        said = capsys.readouterr().out
        assert all(f"foveate ckpt {action} " in said for action in ("ls", "verify", "diff", "rm"))
