"""What reaches a run through its folder: RUN/stop, RUN/save, and a newer start that takes it over.

The news comes to rank 0 by a look every few seconds; here it looks at each step, where it is to be
known which step that is.
"""

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch.distributed as dist

from launcher.local import python_environment
from launcher.process import Failure, Process, save_file, stop_file
from tests.dist import run_distributed
from tests.trainer.runs import TINY, lines, tiny_config
from trainer import manifest
from trainer.__main__ import run
from trainer.config import RunConfig, UserError
from trainer.control import Control
from trainer.loop import Trainer

ROOT = Path(__file__).parents[2]


def ask(rank, world_size, config):
    """Ask for a checkpoint at step 3 and a stop at step 6; return what four starts come to.

    The second finds the file in place, the third and fourth do not.
    """
    run_config = RunConfig.from_json(config)
    run_dir = Path(run_config.run_dir)
    run_dir.mkdir(exist_ok=True)
    place = Process(
        rank=rank, world_size=world_size, local_rank=rank, node=0,
        address="127.0.0.1", port=0, kind="torchrun",
    )  # fmt: skip
    check, files = Trainer._check_numerics, {3: save_file, 6: stop_file}

    def touch(self):
        if rank == 0 and self.state.step in files:
            files[self.state.step](run_dir).touch()
        check(self)

    with mock.patch.object(Control, "SECONDS", 0.0):
        with mock.patch.object(Trainer, "_check_numerics", touch):
            ends = [run(run_config, place), run(run_config, place)]
        dist.barrier()
        stop_file(run_dir).unlink(missing_ok=True)
        dist.barrier()
        ends += [run(run_config, place), run(run_config, place)]
    return [None if end is None else [end.code, end.message] for end in ends]


def test_files_in_the_run_folder_ask_for_a_checkpoint_and_a_stop(tmp_path):
    run_dir = tmp_path / "run"
    config = tiny_config(run_dir, "--checkpoint.every", "1000", "--eval.every-epochs", "100")
    answers = run_distributed(ask, 2, config.to_json(), timeout=600)
    stopped = [78, f"step 6 is saved: remove {run_dir / 'stop'} to go on"]
    refused = [2, f"{run_dir / 'stop'} keeps this run stopped: remove it and start the run again"]
    assert answers == [[stopped, refused, None, None]] * 2
    assert [line["step"] for line in lines(run_dir, "save")] == [4, 6, 20]
    assert not save_file(run_dir).exists()
    assert [line["step"] for line in lines(run_dir, "stop")] == [6]
    assert [line["step"] for line in lines(run_dir, "start")] == [0, 6, 20]
    assert [line["step"] for line in lines(run_dir, "train")] == list(range(1, 21))


@contextmanager
def pretrain(run_dir, *arguments):
    """Start a run as users do; what still runs after the context, stopped or not, is killed."""
    argv = ("--nproc", "2", *TINY, "--run-dir", str(run_dir), "--checkpoint.every", "100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "pretrain", "demo", *argv, *arguments],
        env=python_environment(ROOT), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            for member in (*psutil.Process(process.pid).children(recursive=True), process):
                member.kill()
        process.communicate()


def wait_for(process, begin):
    """Read what rank 0 prints until a line begins like this."""
    for line in process.stdout:
        if line.startswith(begin):
            return
    pytest.fail(process.stderr.read())


@pytest.mark.slow
def test_a_run_on_this_machine_saves_and_stops_when_asked(tmp_path):
    run_dir = tmp_path / "run"
    endless = ("--train.epochs", "100000", "--eval.every-epochs", "100000")
    with pretrain(run_dir, *endless) as process:
        wait_for(process, "train step")
        save_file(run_dir).touch()
        wait_for(process, "save")
        wait_for(process, "train step")
        assert not save_file(run_dir).exists()
        (asked,) = manifest.checkpoints(run_dir / "checkpoints")
        stop_file(run_dir).touch()
        _, said = process.communicate(timeout=600)
    last = lines(run_dir, "stop")[-1]["step"]
    assert (process.returncode, said) == (
        78, f"stopped: step {last} is saved: remove {run_dir / 'stop'} to go on\n",
    )  # fmt: skip
    failure = Failure.read(run_dir)
    assert (failure.code, failure.generation) == (78, 1)
    newest, _ = manifest.newest_good(run_dir / "checkpoints")
    assert manifest.step_of(asked) < manifest.step_of(newest) == last
    with pretrain(run_dir, *endless) as process:
        _, said = process.communicate(timeout=600)
    assert process.returncode == 2
    assert said.startswith(f"error: {run_dir / 'stop'} keeps this run stopped: remove it")
    (startup,) = lines(run_dir, "startup")
    parts = [name for name in startup if name not in ("kind", "step", "time", "total")]
    assert parts == [
        *("folder", "python", "imports", "group", "task", "data", "model", "checkpoint"),
        *("first_batch", "first_step"),
    ]
    assert startup["total"] == pytest.approx(sum(startup[part] for part in parts), abs=1)


def workers(process):
    """The worker processes: torchrun is the launcher's child, the workers are torchrun's."""
    (torchrun,) = psutil.Process(process.pid).children()
    return torchrun.children()


def contents(run_dir):
    """Return all files of a run that tell of its course."""
    told = [run_dir / "metrics.jsonl", *(run_dir / "logs").glob("*.json")]
    kept = [path for path in (run_dir / "checkpoints").rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in (*told, *kept)}


@pytest.mark.slow
def test_a_start_that_comes_back_after_a_newer_one_writes_nothing(tmp_path):
    run_dir = tmp_path / "run"
    # Their heartbeat comes every ten seconds: the old start's would be seen here.
    arguments = ("--guard.hang-seconds", "80", "--train.epochs", "8")
    with pretrain(run_dir, *arguments) as old:
        wait_for(old, "train step")
        stopped = workers(old)
        for worker in stopped:
            worker.send_signal(signal.SIGSTOP)
        with pretrain(run_dir, *arguments) as new:
            _, said = new.communicate(timeout=600)
        assert (new.returncode, said) == (0, "")
        before = contents(run_dir)
        for worker in stopped:
            worker.send_signal(signal.SIGCONT)
        _, said = old.communicate(timeout=600)
    assert old.returncode == 2
    assert said == (
        f"error: {run_dir / 'checkpoints'} belongs to start 2 of this run; this is start 1, which "
        "must have been taken for dead: it stops here and writes nothing\n"
    )
    assert contents(run_dir) == before
    assert Failure.read(run_dir) is None
    all_lines = (run_dir / "metrics.jsonl").read_text()
    assert all_lines.count('"kind": "end"') == 1
    new_steps = all_lines[all_lines.rindex('"kind": "start"') :].count('"kind": "train"')
    assert new_steps == 40, "from the first step on: the old start had saved nothing"


def test_a_failure_of_a_stale_start_is_not_left(tmp_path):
    (tmp_path / "logs").mkdir()
    for _ in range(2):
        newest = manifest.begin_generation(tmp_path / "checkpoints")
    Failure(rank=0, code=1, message="lost its peers", generation=newest - 1).leave(tmp_path)
    assert Failure.read(tmp_path) is None
    Failure(rank=0, code=76, message="stuck", node="n3", generation=newest).leave(tmp_path)
    assert Failure.read(tmp_path).node == "n3"


def test_a_look_costs_the_file_server_something_so_it_waits_for_its_time(tmp_path):
    control = Control(tmp_path, generation=1)
    control.look()
    stop_file(tmp_path).touch()
    control.look()
    assert not control.stop
    with mock.patch.object(Control, "SECONDS", 0.0):
        late = Control(tmp_path, generation=1)
    late.look()
    assert late.stop


def test_what_a_newer_start_is_called_is_said(tmp_path):
    manifest.begin_generation(tmp_path / "checkpoints")
    control = Control(tmp_path, generation=1)
    assert control.owns_folder()
    manifest.begin_generation(tmp_path / "checkpoints")
    assert not control.owns_folder()
    with pytest.raises(UserError, match="belongs to start 2 of this run; this is start 1"):
        raise control.fenced()
