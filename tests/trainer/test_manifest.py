"""Whole or not at all: committing, damage of every kind, generations, and kills while writing."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import manifest
from trainer.manifest import Fenced, Manifest

ROOT = Path(__file__).parents[2]
RECORD = {"state": {"step": 5, "cursor": {"samples": 120}}, "model": "transnext_pico"}


def commit(root, step, *, generation=1, record=RECORD):
    """Make a checkpoint of two files as the checkpointer does."""
    staged = manifest.staging_folder(root, step, generation)
    staged.mkdir(parents=True)
    (staged / "shard-1.safetensors").write_bytes(bytes(range(100)) + b"%d" % step)
    (staged / "shard-2.safetensors").write_bytes(b"x" * 50)
    files = tuple(manifest.describe(path) for path in sorted(staged.iterdir()))
    return manifest.commit(
        root, Manifest(step=step, generation=generation, files=files, record=record)
    )


@pytest.fixture
def root(tmp_path):
    manifest.begin_generation(tmp_path)
    return tmp_path


def test_it_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; import trainer.manifest"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_what_was_committed_is_read_back_and_is_whole(root):
    folder = commit(root, 5)
    assert folder == root / "step_0000000005"
    found = manifest.read(folder)
    assert (found.step, found.generation, found.record) == (5, 1, RECORD)
    assert [(file.name, file.num_bytes) for file in found.files] == [
        ("shard-1.safetensors", 101),
        ("shard-2.safetensors", 50),
    ]
    assert list(manifest.problems(folder, found.files)) == []
    assert manifest.newest_good(root) == (folder, [])
    assert sorted(path.name for path in root.iterdir()) == ["generation", "step_0000000005"]


def test_checkpoints_are_ordered_by_step(root):
    folders = [commit(root, step) for step in (5, 100, 20)]
    assert manifest.checkpoints(root) == [folders[0], folders[2], folders[1]]
    assert manifest.newest_good(root) == (folders[1], [])


def test_nothing_there_is_no_checkpoint(root):
    assert manifest.newest_good(root) == (None, [])
    assert manifest.newest_good(root / "nowhere") == (None, [])


def test_the_same_step_again_replaces_it(root):
    commit(root, 5)
    assert manifest.begin_generation(root) == 2
    folder = commit(root, 5, generation=2)
    assert manifest.read(folder).generation == 2
    assert manifest.newest_good(root) == (folder, [])


def test_a_kill_while_replacing_leaves_the_old_or_the_new_one_whole(root):
    """The new one is put into place by the second renaming, the old one removed after it."""
    script = """
import os, shutil, sys
from pathlib import Path
from tests.trainer.test_manifest import commit
from trainer import manifest

root, deadly, rename = Path(sys.argv[1]), sys.argv[2], Path.rename

def fatal(*args, **options):
    os.kill(os.getpid(), 9)

def fatal_into_place(source, target):
    fatal() if source.name.startswith("writing_") else rename(source, target)

if deadly == "rename":
    Path.rename = fatal_into_place
else:
    shutil.rmtree = fatal
commit(root, 5, generation=manifest.begin_generation(root))
"""
    folder = commit(root, 5)
    # Every start and every look after a kill raises the generation, which begins as 1.
    for deadly, survivor in (("rename", 1), ("remove", 4)):
        done = subprocess.run([sys.executable, "-c", script, str(root), deadly], cwd=ROOT)
        assert done.returncode == -signal.SIGKILL
        manifest.begin_generation(root)
        assert manifest.newest_good(root) == (folder, [])
        assert manifest.read(folder).generation == survivor
        assert sorted(path.name for path in root.iterdir()) == ["generation", folder.name]


def lose_manifest(folder):
    (folder / manifest.MANIFEST).unlink()
    return folder.name, "no MANIFEST.json"


def garble_manifest(folder):
    (folder / manifest.MANIFEST).write_text('{"step": 10, "files"')
    return f"{folder.name}/MANIFEST.json", "cannot be read"


def empty_manifest(folder):
    (folder / manifest.MANIFEST).write_bytes(b"")
    return f"{folder.name}/MANIFEST.json", "cannot be read"


def binary_manifest(folder):
    (folder / manifest.MANIFEST).write_bytes(b"\xff\x00\xfe" * 9)
    return f"{folder.name}/MANIFEST.json", "cannot be read"


def list_manifest(folder):
    (folder / manifest.MANIFEST).write_text("[]")
    return f"{folder.name}/MANIFEST.json", "cannot be read"


def move_the_cursor(folder):
    path = folder / manifest.MANIFEST
    path.write_text(path.read_text().replace('"samples": 120', '"samples": 144'))
    return f"{folder.name}/MANIFEST.json", "does not match its hash"


def truncate(folder):
    path = folder / "shard-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return f"{folder.name}/shard-2.safetensors", "has 49 bytes instead of 50"


def lengthen(folder):
    with (folder / "shard-2.safetensors").open("ab") as file:
        file.write(b"y")
    return f"{folder.name}/shard-2.safetensors", "has 51 bytes instead of 50"


def alter(folder):
    path = folder / "shard-1.safetensors"
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    return f"{folder.name}/shard-1.safetensors", "does not match its hash"


def lose_file(folder):
    (folder / "shard-1.safetensors").unlink()
    return f"{folder.name}/shard-1.safetensors", "cannot be read: No such file"


DAMAGES = (
    lose_manifest,
    garble_manifest,
    empty_manifest,
    binary_manifest,
    list_manifest,
    move_the_cursor,
    truncate,
    lengthen,
    alter,
    lose_file,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_next_older_good_one_chosen(root, damage):
    commit(root, 5)
    older, newest = commit(root, 10), commit(root, 15)
    where, what = damage(newest)
    found, skipped = manifest.newest_good(root)
    assert found == older
    assert len(skipped) == 1
    assert f"{root}/{where}" in skipped[0]
    assert what in skipped[0]


def test_all_damaged_gives_none_and_every_reason_newest_first(root):
    folders = [commit(root, step) for step in (5, 10, 15)]
    for folder, damage in zip(folders, (truncate, lose_manifest, alter), strict=True):
        damage(folder)
    found, skipped = manifest.newest_good(root)
    assert found is None
    for folder, reason in zip(reversed(folders), skipped, strict=True):
        assert str(folder) in reason


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_altered_byte_of_any_file_is_noticed(root, data):
    folder = commit(root, 5)
    try:
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        found, skipped = manifest.newest_good(root)
        assert found is None
        assert str(folder) in skipped[0]
    finally:
        manifest.remove(folder)


def test_removing_takes_the_manifest_first(root):
    """A removal killed half-way leaves a folder that nobody takes for whole."""
    script = """
import os, shutil, sys
from pathlib import Path
from trainer import manifest

# The file system call that follows the manifest's is never made.
shutil.rmtree = lambda *args, **options: os.kill(os.getpid(), 9)
manifest.remove(Path(sys.argv[1]))
"""
    older, newest = commit(root, 5), commit(root, 10)
    done = subprocess.run([sys.executable, "-c", script, str(newest)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in newest.iterdir()) == [
        "shard-1.safetensors",
        "shard-2.safetensors",
    ]
    found, skipped = manifest.newest_good(root)
    assert found == older
    assert "it was never completed" in skipped[0]
    manifest.remove(newest)  # what is left can be removed again
    assert manifest.newest_good(root) == (older, [])


def test_every_start_raises_the_generation_and_clears_what_was_left(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    assert manifest.begin_generation(root) == 1
    kept = commit(root, 5)
    left = manifest.staging_folder(root, 10, 1)
    left.mkdir()
    (left / "shard-1.safetensors").write_bytes(b"torn")
    assert manifest.begin_generation(root) == 2
    assert manifest.begin_generation(root) == 3
    assert not left.exists()
    assert manifest.newest_good(root) == (kept, [])


def test_a_stale_start_is_fenced_off(root):
    good = commit(root, 5)
    assert manifest.begin_generation(root) == 2
    with pytest.raises(Fenced) as fenced:
        commit(root, 10)
    assert str(root) in str(fenced.value)
    assert "start 2" in str(fenced.value)
    assert "start 1" in str(fenced.value)
    assert manifest.checkpoints(root) == [good]
    with pytest.raises(Fenced):
        manifest.check_generation(root, 1)
    manifest.check_generation(root, 2)
    assert manifest.read(commit(root, 10, generation=2)).generation == 2


def test_a_stale_start_that_is_overtaken_in_mid_commit_changes_nothing(root):
    """The newer start comes right after the stale one has looked for it."""
    good = commit(root, 5)
    check, looks = manifest.check_generation, []

    def overtaken(*arguments):
        check(*arguments)
        looks.append(arguments)
        if len(looks) == 1:
            manifest.begin_generation(root)

    with mock.patch.object(manifest, "check_generation", overtaken), pytest.raises(Fenced):
        commit(root, 5)
    assert manifest.newest_good(root) == (good, [])
    assert sorted(path.name for path in root.iterdir()) == ["generation", good.name]


@pytest.mark.parametrize("content", [b"", b"\xff", b"x"])
def test_a_generation_that_the_disk_has_altered_is_counted_on(root, content):
    for generation in (2, 3):
        manifest.begin_generation(root)
        commit(root, generation, generation=generation)
    (root / "generation").write_bytes(content)
    with pytest.raises(Fenced):
        manifest.check_generation(root, 2)
    assert manifest.begin_generation(root) == 4


def test_folders_of_other_names_are_no_checkpoints(root):
    folder = commit(root, 5)
    (root / "step_0000000005_backup").mkdir()
    assert manifest.checkpoints(root) == [folder]


WRITER = """
import itertools, sys
from pathlib import Path
from trainer.manifest import write_atomically

for number in itertools.count(1):
    write_atomically(Path(sys.argv[1]), f"{number} " * 5000)
    print(number, flush=True)
"""


def test_a_kill_while_writing_leaves_the_old_or_the_new_content(tmp_path):
    path = tmp_path / "generation"
    for rounds in (1, 2, 7, 30, 31):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(rounds):
                done = int(writer.stdout.readline())
            writer.kill()
            done = max([done, *map(int, writer.stdout.read().split())])
        number = path.read_text().split()[0]
        assert path.read_text() == f"{number} " * 5000
        assert int(number) in (done, done + 1)


def test_the_manifest_is_plain_json(root):
    values = json.loads((commit(root, 5) / manifest.MANIFEST).read_text())
    assert values["step"] == 5
    assert values["record"] == RECORD


def test_a_record_survives_as_it_is(root):
    record = {"state": {"best": 71.25, "best_step": None}, "name": "é"}
    assert manifest.read(commit(root, 5, record=record)).record == record
