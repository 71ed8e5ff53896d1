"""A sample that went bad on the disk: a run goes on without it, or stops and names it."""

import json

import pytest

from data.folder import SyntheticSource
from data.index import Manifest, check_shard
from data.pack import pack
from launcher import rundir
from launcher.local import launch
from tests.trainer.runs import lines, tiny_config


@pytest.fixture
def shards(tmp_path):
    """A training set in two shards, one sample of which has a flipped bit."""
    source = SyntheticSource(num_samples=120, num_classes=10, size=20)
    folder = tmp_path / "train"
    pack(source, folder, samples_per_shard=60, progress=lambda _: None)
    shard = Manifest.load(folder).shards[1]
    offset = int(check_shard(folder, shard)["offset"][7])
    with (folder / shard.name).open("rb+") as file:
        file.seek(offset + 60)
        byte = file.read(1)[0]
        file.seek(offset + 60)
        file.write(bytes([byte ^ 1]))
    return folder


def run_on(shards, run_dir, *arguments):
    places = ["--data.source", "webdataset", "--data.train", str(shards), "--data.val", str(shards)]
    return rundir.prepare(
        tiny_config(run_dir, *places, "--eval.every-epochs", "9", "--train.epochs", "2", *arguments)
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ["full", "stream"])
def test_a_run_goes_on_with_another_image_in_its_place(shards, tmp_path, order):
    arguments = ["--data.order", order, "--data.lanes", "4", "--data.window", "9"]
    run = run_on(shards, tmp_path / "run", "--data.max-bad", "0.01", *arguments)
    code = launch(run, num_processes=2)
    counts = ("epoch", "shown", "replaced", "quarantined")
    audits = [tuple(line[name] for name in counts) for line in lines(run, "audit")]
    assert audits == [(0, 119, 1, 1), (1, 119, 1, 1)]
    log = "".join(path.read_text() for path in (run / "logs").glob("rank_*.log"))
    # Either rank may be the one that comes upon it, in either epoch; each says so once.
    assert 1 <= log.count("train-000001.tar:000000067.png (sample 67) has changed") <= 2
    assert "train-000001.tar:000000068.png (sample 68) takes its place" in log
    manifest = json.loads((run / "checkpoints" / "step_0000000005" / "MANIFEST.json").read_text())
    assert manifest["record"]["state"]["cursor"]["quarantine"] == [67]
    assert code == 2, "the evaluation split is the same folder: there it is an error"


@pytest.mark.slow
def test_by_default_a_small_set_must_be_whole(shards, tmp_path):
    run = run_on(shards, tmp_path / "run")
    assert launch(run, num_processes=1) == 2
    failure = json.loads((run / "logs" / "failure.json").read_text())
    assert "train-000001.tar:000000067.png (sample 67) has changed" in failure["message"]
    assert "restore the shard" in failure["message"]
