"""Signals: one rank is told, all leave after the same step, and the run goes on when started."""

import os
import signal
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from data.base import Stopped
from data.folder import SyntheticSource
from data.pack import pack
from launcher.local import python_environment
from launcher.process import REQUEUE
from tests.data.servers import FileServer
from tests.dist import run_distributed
from tests.trainer.runs import TINY, lines, tiny_config, train
from trainer import manifest
from trainer.control import Control
from trainer.group import gather
from trainer.signals import Signals

ROOT = Path(__file__).parents[2]
NO_CONTROL = Control(Path("no run folder"), generation=1)
TOLD_AT = 3
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def leave_when_told(rank, world_size):
    """For every signal, count steps until the ranks agree to stop; the last rank gets it."""
    heed_every_signal()
    steps, received = [], []
    for number in ASKING:
        signals = Signals(dist.new_group(backend="gloo"), NO_CONTROL)
        for asked in (number, None):
            step = 0
            while not signals.agree() and step < 20:
                step += 1
                if step == TOLD_AT and rank == world_size - 1 and asked is not None:
                    os.kill(os.getpid(), asked)
            steps.append(step)
        received.append(signals.received)
    return {"steps": steps, "received": received}


def test_all_ranks_leave_after_the_same_step():
    answers = run_distributed(leave_when_told, 2)
    told = [number.name for number in ASKING]
    assert [answer["received"] for answer in answers] == [[None] * len(told), told]
    first, second = (answer["steps"] for answer in answers)
    assert first == second
    assert first == [TOLD_AT, 0] * len(told)  # who was told stays told


def leave_while_one_waits(rank, world_size, told):
    """Rank 1 waits for data twice; the second time they never come, and `told` gets a signal."""
    heed_every_signal()
    signals = Signals(dist.new_group(backend="gloo"), NO_CONTROL)
    pids = gather(os.getpid())
    said = []
    for data_come in (True, False):
        try:
            for votes in count() if rank == 1 else ():
                if data_come and votes == 2:
                    break
                signals.while_waiting()
                if votes == 2:
                    os.kill(pids[told], signal.SIGTERM)
        except Stopped:
            return [*said, "stopped"]
        said.append(signals.agree())
    return said


@pytest.mark.parametrize("told", [0, 1])
def test_a_rank_that_waits_for_data_leaves_with_the_others(told):
    assert run_distributed(leave_while_one_waits, 2, told) == [[False, True], [False, "stopped"]]


def train_far(rank, world_size, config, pids):
    """Train; returns whether that was completed."""
    heed_every_signal()
    (Path(pids) / str(rank)).write_text(str(os.getpid()))
    return train(rank, world_size, config)


def test_a_run_whose_store_is_dead_saves_and_stops_at_a_signal(tmp_path):
    """The server accepts, and says nothing, whoever asks for a shard in the second epoch."""
    source = SyntheticSource(num_samples=96, num_classes=10, size=20)
    pack(source, tmp_path / "set", samples_per_shard=8, progress=lambda _: None)
    with FileServer(tmp_path / "set") as server:
        server.faults["set-000007.tar"].extend([*[None] * 12, *["stall"] * 99])
        config = tiny_config(
            tmp_path / "run",
            *("--data.source", "webdataset", "--data.train", server.url),
            *("--data.val", str(tmp_path / "set"), "--eval.every-epochs", "9"),
        )

        def tell():
            server.stalled.acquire()
            metrics = tmp_path / "run" / "metrics.jsonl"
            while not (metrics.exists() and '"train"' in metrics.read_text()):
                server.release.wait(0.05)  # what stalls was asked for ahead
            os.kill(int((tmp_path / "0").read_text()), signal.SIGTERM)

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        done = run_distributed(train_far, 2, config.to_json(), str(tmp_path))
        telling.join()
        assert not server.release.is_set()
    assert done == [False, False]
    newest, _ = manifest.newest_good(tmp_path / "run" / "checkpoints")
    (stop,) = lines(tmp_path / "run", "stop")
    assert manifest.read(newest).step == stop["step"] == len(lines(tmp_path / "run", "train"))


def heed_every_signal():
    """The tests themselves may run under nohup or in the background."""
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL)


def start(run_dir):
    arguments = (
        *("--nproc", "2", *TINY, "--run-dir", str(run_dir), "--train.epochs", "8"),
        *("--checkpoint.every", "1000", "--eval.every-epochs", "100"),
    )
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", "pretrain", "demo", *arguments],
        env=python_environment(ROOT), preexec_fn=heed_every_signal,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_a_step(process):
    """Read what rank 0 prints until a training step of this start is reported."""
    for line in process.stdout:
        if line.startswith("train step"):
            return
    pytest.fail(process.stderr.read())


def worker(process, rank):
    """The process of a rank: torchrun is the launcher's child, the workers are torchrun's."""
    (torchrun,) = psutil.Process(process.pid).children()
    return next(c for c in torchrun.children() if c.environ()["RANK"] == str(rank))


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on_when_started_again(tmp_path):
    run_dir = tmp_path / "run"
    saved = [0]
    for tell in (
        lambda process: worker(process, 1).send_signal(signal.SIGUSR1),
        lambda process: process.send_signal(signal.SIGHUP),
    ):
        with start(run_dir) as process:
            wait_for_a_step(process)
            tell(process)
            _, said = process.communicate(timeout=120)
        assert process.returncode == REQUEUE, said
        newest, skipped = manifest.newest_good(run_dir / "checkpoints")
        assert skipped == []
        saved.append(manifest.read(newest).step)
        assert f"stopped: step {saved[-1]} is saved: start the run again to go on\n" in said
        assert lines(run_dir, "stop")[-1]["step"] == saved[-1]
    with start(run_dir) as process:
        _, said = process.communicate(timeout=240)
    assert (process.returncode, said) == (0, "")
    assert [line["step"] for line in lines(run_dir, "start")] == saved
    assert saved == sorted(set(saved)), "every start got further"
    total = lines(run_dir, "start")[0]["steps"]
    assert [line["step"] for line in lines(run_dir, "end")] == [total]
    assert [line["step"] for line in lines(run_dir, "train")] == list(range(1, total + 1))
