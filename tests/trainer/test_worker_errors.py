"""What a user gets wrong, end to end: one line that names the thing and the remedy, exit code 2.

One run of a few steps over real shards is made first; every case is a copy of its newest
checkpoint with one thing spoilt, so that each takes a single short start.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.folder import SyntheticSource
from data.pack import pack
from launcher.local import python_environment
from tests.trainer.disk import on_small_disk
from tests.trainer.runs import TINY, lines
from trainer import manifest

ROOT = Path(__file__).parents[2]
EVERY = 2  # steps between checkpoints; the run has 4
NEWEST = "step_0000000002"

pytestmark = pytest.mark.slow


def command(run_dir, shards, *arguments):
    return [
        *(sys.executable, "-m", "launcher", "pretrain", "demo", *TINY),
        *("--data.source", "webdataset", "--run-dir", str(run_dir)),
        *("--data.train", str(shards / "train"), "--data.val", str(shards / "val")),
        *("--train.epochs", "2", "--checkpoint.every", str(EVERY), *arguments),
    ]


def pretrain(argv):
    return subprocess.run(
        argv, env=python_environment(ROOT), capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with packed shards and a finished run over them."""
    folder = tmp_path_factory.mktemp("finished")
    for name, count in (("train", 48), ("val", 20)):
        source = SyntheticSource(num_samples=count, num_classes=10, size=20)
        pack(source, folder / name, samples_per_shard=16, progress=lambda line: None)
    done = pretrain(command(folder / "run", folder))
    assert done.returncode == 0, done.stderr
    assert manifest.checkpoints(folder / "run" / "checkpoints")[0].name == NEWEST
    return folder


@pytest.fixture
def case(finished, tmp_path):
    """Copies that a test may spoil: the shards, and the run as it was after its second step."""
    later = shutil.ignore_patterns("step_0000000004", "generation")
    for name in ("train", "val", "run"):
        shutil.copytree(finished / name, tmp_path / name, ignore=later)
    checkpoints = tmp_path / "run" / "checkpoints"
    return SimpleNamespace(
        folder=tmp_path,
        run=tmp_path / "run",
        shards=sorted((tmp_path / "train").glob("*.tar")),
        checkpoint=checkpoints / NEWEST,
        before=contents(checkpoints),
    )


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line(done, *said):
    """Exit code 2, and nothing on the terminal but one line that says all that is expected."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout
    for words in said:
        assert words in done.stderr


def remove_a_shard(case):
    case.shards[1].unlink()
    return f"{case.shards[1]} is missing", "restore the shard"


def truncate_a_shard(case):
    size = case.shards[1].stat().st_size
    with case.shards[1].open("r+b") as file:
        file.truncate(size - 100)
    said = f"{case.shards[1]} is truncated: {size - 100} bytes instead of {size}"
    return said, "restore the shard"


def garble_the_data_manifest(case):
    path = case.folder / "train" / "manifest.json"
    path.write_text(path.read_text()[:-20])
    return f"{path} is unreadable", f"run `foveate data index {case.folder / 'train'}`"


def alter_the_data_manifest(case):
    """It is a manifest still, but of other data than the run has seen so far."""
    path = case.folder / "train" / "manifest.json"
    values = json.loads(path.read_text())
    dropped = values["shards"].pop()
    values["total"] -= dropped["num_samples"]
    path.write_text(json.dumps(values))
    return "the cursor belongs to data set", "restore the data, or start a new run"


def rename_a_class_for_evaluation(case):
    """As a folder does that only one of the splits has: the labels behind it mean others."""
    path = case.folder / "val" / "manifest.json"
    values = json.loads(path.read_text())
    values["classes"][3] = ".ipynb_checkpoints"
    path.write_text(json.dumps(values))
    said = f"{case.folder / 'val'} has other classes than {case.folder / 'train'}: class 3 is "
    return f"{said}.ipynb_checkpoints, not class_3", "both must have the same"


def damage_every_checkpoint(case):
    path = next(case.checkpoint.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    case.before[path] = bytes(content)
    return (
        f"no checkpoint in {case.run / 'checkpoints'} is whole: {path} does not match its hash",
        "restore one, or remove the folder to start anew",
    )


@pytest.mark.parametrize(
    "spoil",
    [
        remove_a_shard,
        truncate_a_shard,
        garble_the_data_manifest,
        alter_the_data_manifest,
        rename_a_class_for_evaluation,
        damage_every_checkpoint,
    ],
)
def test_a_run_that_cannot_go_on_says_why_in_one_line(case, spoil):
    said = spoil(case)
    assert_one_line(pretrain(command(case.run, case.folder)), *said)
    left = contents(case.run / "checkpoints")
    left.pop(case.run / "checkpoints" / "generation", None)
    assert left == case.before, "the last good checkpoint is untouched"


def test_a_checkpoint_of_another_model_is_named(case):
    """The folder of a run with other settings, into which somebody copied a checkpoint."""
    arguments = ("--model.name", "transxnet_pico")
    shutil.move(case.run, case.folder / "other")
    assert pretrain([*command(case.run, case.folder, *arguments), "--prepare"]).returncode == 0
    shutil.copytree(case.folder / "other" / "checkpoints", case.run / "checkpoints")
    done = pretrain(command(case.run, case.folder, *arguments))
    assert_one_line(
        done, f"{case.checkpoint} is a checkpoint of transnext_pico, not of transxnet_pico"
    )


def test_a_wrong_number_of_classes_names_the_setting(case):
    arguments = ("--run-dir", str(case.folder / "new"), "--model.num-classes", "7")
    done = pretrain(command(case.run, case.folder, *arguments))
    said = "has 10 classes but model.num_classes is 7: set --model.num-classes 10"
    assert_one_line(done, f"{case.folder / 'train'} {said}")


def test_a_batch_that_is_too_small_for_the_processes_names_one_that_is_not(case):
    arguments = ("--run-dir", str(case.folder / "new"), "--nproc", "2", "--train.batch-size", "2")
    done = pretrain(command(case.run, case.folder, *arguments))
    assert_one_line(done, "global batch 2 is too small for 2 processes", "use at least 4")


def test_a_single_image_without_company_cannot_be_batch_normalised(case):
    model = ("--model.name", "transxnet_pico", "--data.mixup", "0", "--data.cutmix", "0")
    arguments = ("--run-dir", str(case.folder / "new"), *model, "--train.batch-size", "1")
    done = pretrain(command(case.run, case.folder, *arguments))
    assert_one_line(done, "BatchNorm over", "got one value per channel", "a larger batch")


def test_numbers_gone_bad_end_in_code_77_and_are_on_record_to_the_last_step(case):
    run = case.folder / "new"
    options = ("--train.epochs", "9", "--eval.every-epochs", "9", "--log.every", "1")
    diverging = ("--optim.lr", "1e30", "--optim.warmup-epochs", "0", "--optim.clip-grad", "None")
    done = pretrain(command(run, case.folder, *options, *diverging))
    assert done.returncode == 77, done.stderr
    assert done.stderr.startswith("error: gradients were not finite for a whole log interval")
    assert done.stderr.count("\n") == 1
    failure = json.loads((run / "logs" / "failure.json").read_text())
    assert failure["code"] == 77

    text = (run / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line, parse_constant=no_constant) for line in text]
    steps = [line["step"] for line in written if line["kind"] == "train"]
    assert written[-1]["grad_norm"] is None
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == steps


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_a_disk_that_runs_full_midway_leaves_the_last_good_checkpoint(case):
    """The disk takes the run as it stands and not one checkpoint more."""
    disk = case.folder / "disk"
    disk.mkdir()
    used = sum(path.stat().st_blocks * 512 for path in case.run.rglob("*"))
    checkpoint = sum(len(content) for content in case.before.values())
    script = """
import shutil, subprocess, sys
from pathlib import Path
from trainer import manifest

run, disk = Path(sys.argv[1]), Path(sys.argv[2])
shutil.copytree(run, disk / "run")
code = subprocess.run(sys.argv[3:]).returncode
checkpoints = disk / "run" / "checkpoints"
print("left:", *sorted(path.name for path in checkpoints.iterdir()))
print("good:", manifest.newest_good(checkpoints))
sys.exit(code)
"""
    inner = command(disk / "run", case.folder, "--nproc", "2")
    done = pretrain(
        on_small_disk(
            disk,
            [sys.executable, "-c", script, str(case.run), str(disk), *inner],
            num_bytes=used + checkpoint // 2,
        )
    )
    assert_one_line(
        done,
        f"the checkpoint of step 4 could not be written to {disk / 'run' / 'checkpoints'}: ",
        "No space left on device",
        "older checkpoints are intact: make room and start the run again",
    )
    assert f"left: generation {NEWEST}\n" in done.stdout
    assert f"good: ({(disk / 'run' / 'checkpoints' / NEWEST)!r}, [])\n" in done.stdout


def test_a_disk_that_is_too_full_for_a_report_is_told_nevertheless(case):
    """A page is left, which the start itself takes: not even the failure can be written down."""
    disk = case.folder / "disk"
    disk.mkdir()
    used = sum(path.stat().st_blocks * 512 for path in case.run.rglob("*"))
    script = """
import os, shutil, subprocess, sys

shutil.copytree(sys.argv[1], sys.argv[2])
with open(f"{sys.argv[2]}/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        filler.truncate(filler.tell() - 4096)
sys.exit(subprocess.run(sys.argv[3:]).returncode)
"""
    inner = command(disk / "run", case.folder)
    done = pretrain(
        on_small_disk(
            disk,
            [sys.executable, "-c", script, str(case.run), str(disk / "run"), *inner],
            num_bytes=used + 100_000,
        )
    )
    assert_one_line(done, f"the disk of {disk / 'run'} is full: make room and start again")


def test_the_finished_run_is_what_the_cases_start_from(finished):
    assert [line["step"] for line in lines(finished / "run", "end")] == [4]
