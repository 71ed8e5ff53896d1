"""The last save before the kill: how long there is, and what is left where that is too short."""

import math
import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from launcher.__main__ import main
from launcher.process import Process
from tests.dist import run_distributed
from tests.trainer.runs import lines, tiny_config
from trainer import manifest
from trainer.__main__ import run
from trainer.config import RunConfig, UserError
from trainer.control import Control
from trainer.loop import Trainer
from trainer.signals import Signals

PLACE = Process(
    rank=0, world_size=1, local_rank=0, node=0, address="127.0.0.1", port=0, kind="torchrun"
)
NO_CONTROL = Control(Path("no run folder"), generation=1)


def tell():
    os.kill(os.getpid(), signal.SIGUSR1)


def seconds_left(rank, world_size):
    """What is left before and after a signal, without and with the end of a Slurm job."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signals = Signals(dist.new_group(backend="gloo"), NO_CONTROL)
    before = signals.seconds_left(3000.0)
    with mock.patch.dict(os.environ, {"SLURM_JOB_END_TIME": str(int(time.time()) + 50000)}):
        job = signals.seconds_left(3000.0)
        tell()
        told = [signals.seconds_left(3000.0), signals.seconds_left(900000.0)]
    told.append(signals.seconds_left(None))
    first = signals.seconds_left(3000.0)
    tell()  # a second one gives no more time
    told.append(signals.seconds_left(3000.0))
    return {"before": before, "job": job, "told": told, "first": first}


def test_the_seconds_left_are_those_to_the_first_end():
    (left,) = run_distributed(seconds_left, 1)
    assert left["before"] == math.inf
    assert 3000 < left["job"] <= 50000
    signalled, to_job_end, for_ever, again = left["told"]
    assert 0 < signalled <= 3000 < to_job_end <= 50000
    assert for_ever == math.inf
    assert again <= left["first"] <= 3000


def stop_at_step_4(rank, world_size, config):
    """Run until a signal after step 4; return the step it stopped at, and what it says."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    check = Trainer._check_numerics
    steps = []

    def tell_once(self):
        steps.append(self.state.step)
        if self.state.step == 4:
            tell()
        check(self)

    run_config = RunConfig.from_json(config)
    Path(run_config.run_dir).mkdir(parents=True)
    with mock.patch.object(Trainer, "_check_numerics", tell_once):
        failure = run(run_config, PLACE)
    return [steps[-1], failure.code, failure.message]


def test_a_last_save_is_made_if_the_time_is_enough(tmp_path, capsys):
    options = ("--checkpoint.grace", "100000", "--checkpoint.local-dir", str(tmp_path / "local"))
    config = tiny_config(tmp_path / "run", "--checkpoint.every", "3", *options)
    ((stopped, code, message),) = run_distributed(stop_at_step_4, 1, config.to_json())
    assert (code, message) == (75, f"step {stopped} is saved: start the run again to go on")
    folder = manifest.step_folder(tmp_path / "run" / "checkpoints", stopped)
    assert manifest.newest_good(tmp_path / "run" / "checkpoints") == (folder, [])
    saves = lines(tmp_path / "run", "save")
    assert [line["step"] for line in saves] == [3, 4]
    assert all(line["stall"] > 0 for line in saves)
    (local,) = (tmp_path / "local").iterdir()
    assert list(local.iterdir()) == [], "it went that way, and nothing stayed"
    assert main(["ckpt", "ls", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("fsdp on 1, start 1\n") == 2


def test_a_local_folder_is_the_same_wherever_a_worker_starts(tmp_path):
    with pytest.raises(UserError, match="local_dir is scratch: give an absolute path"):
        tiny_config(tmp_path, "--checkpoint.local-dir", "scratch")


def test_without_time_there_is_no_last_save_and_none_is_lost(tmp_path):
    config = tiny_config(tmp_path / "run", "--checkpoint.every", "3", "--checkpoint.grace", "1e-9")
    config_sync = config.to_json().replace('"async_save": true', '"async_save": false')
    ((stopped, code, message),) = run_distributed(stop_at_step_4, 1, config_sync)
    assert (code, stopped) == (75, 4)
    assert message == (
        f"step {stopped} could not be saved in the time left: start the run again to go on"
    )
    root = tmp_path / "run" / "checkpoints"
    assert manifest.newest_good(root) == (manifest.step_folder(root, 3), [])
    assert manifest.checkpoints(root) == [manifest.step_folder(root, 3)]
