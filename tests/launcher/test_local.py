"""Real processes under the real torchrun; only what a worker does is cut down to a few lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from launcher import rundir
from launcher.local import num_gpus, python_environment
from trainer.config import override
from trainer.recipes import recipe

WORKER = """
import os, signal, sys, time
from pathlib import Path

from launcher.process import Failure, Process, open_log

process = Process.from_environment(os.environ)
run_dir = Path(sys.argv[sys.argv.index("--config") + 1]).parent
before = open_log(run_dir, process.rank)
print("hello from", process.rank, process.world_size, process.kind, flush=True)
print("note from", process.rank, os.environ["OMP_NUM_THREADS"], file=sys.stderr, flush=True)


def fail(code, message):
    Failure(rank=process.rank, code=code, message=message).leave(run_dir)
    print("error:", message, file=before, flush=True)
    os._exit(code)

"""
LAUNCH = """
import sys
from pathlib import Path

from launcher.local import launch

sys.exit(launch(Path(sys.argv[1]), num_processes=int(sys.argv[2])))
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return rundir.prepare(override(recipe("demo"), ["--run-dir", str(tmp_path / "run")]))


def _start(
    run_dir: Path, body: str, *, num_processes: int, prefix: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    worker = run_dir / "code" / "trainer" / "__main__.py"
    worker.write_text(WORKER + textwrap.dedent(body))
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", LAUNCH, str(run_dir), str(num_processes)],
        env=python_environment(rundir.CODE),
        preexec_fn=heed_every_signal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _launch(run_dir: Path, body: str, *, num_processes: int = 2) -> tuple[int, str, str]:
    with _start(run_dir, body, num_processes=num_processes) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def _log(run_dir: Path, rank: int) -> str:
    return (run_dir / "logs" / f"rank_{rank:05d}.log").read_text()


@pytest.mark.parametrize(("num_processes", "kind"), [(1, "single"), (2, "torchrun")])
def test_rank_0_talks_to_the_terminal_and_every_rank_has_a_log(run_dir, num_processes, kind):
    for _ in range(2):  # the second start appends
        code, out, err = _launch(run_dir, "", num_processes=num_processes)
        assert (code, out, err) == (0, f"hello from 0 {num_processes} {kind}\n", "")
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    assert _log(run_dir, 0) == f"note from 0 {threads}\n" * 2
    if num_processes == 2:
        assert _log(run_dir, 1) == f"hello from 1 2 torchrun\nnote from 1 {threads}\n" * 2


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_users_mistake_is_one_line(run_dir, num_processes):
    body = 'fail(2, "no shards in /data: fetch them")'
    code, _, err = _launch(run_dir, body, num_processes=num_processes)
    assert (code, err) == (2, "error: no shards in /data: fetch them\n")


def test_the_first_failure_is_the_cause_whatever_follows_it(run_dir):
    body = """
    if process.rank == 1:
        fail(77, "the loss is nan at step 3")
    signal.signal(signal.SIGTERM, lambda number, frame: fail(75, "told to stop"))
    signal.pause()
    """
    code, _, err = _launch(run_dir, body)
    assert (code, err) == (77, "error: the loss is nan at step 3\n")


def test_a_bug_shows_its_traceback_and_the_log(run_dir):
    body = 'fail(1, "Traceback ...\\nKeyError: 3") if process.rank == 1 else signal.pause()'
    code, _, err = _launch(run_dir, body)
    assert code == 1
    assert err.startswith("Traceback ...\nKeyError: 3\nrank 1 failed: see ")
    assert err.endswith("logs/rank_00001.log\n")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_rank_that_was_killed_is_the_cause_whatever_the_others_report(run_dir, num_processes):
    body = f"""
    import psutil
    pid = Path(run_dir, "pid")
    if process.rank == {num_processes - 1}:
        pid.with_suffix(".part").write_text(str(os.getpid()))
        pid.with_suffix(".part").rename(pid)
        os.kill(os.getpid(), signal.SIGKILL)
    while not pid.exists() or psutil.Process(int(pid.read_text())).status() != "zombie":
        os.sched_yield()
    fail(1, "Traceback ...\\nRuntimeError: Connection closed by peer")
    """
    code, _, err = _launch(run_dir, body, num_processes=num_processes)
    assert (code, err.count("\n")) == (128 + 9, 1)
    assert err.startswith(f"error: rank {num_processes - 1} was ended by SIGKILL, as the system ")
    assert err.endswith(f"when memory runs out: see {run_dir / 'logs'}\n")


def test_workers_that_end_without_a_word_are_reported_with_what_they_left(run_dir):
    code, _, err = _launch(run_dir, "os._exit(5)", num_processes=1)
    said = f"error: the workers died without a report (exit code 5): see {run_dir / 'logs'}\n"
    assert (code, err) == (5, said)


def test_an_old_failure_is_not_read_again(run_dir):
    assert _launch(run_dir, 'fail(2, "once")', num_processes=1)[0] == 2
    assert _launch(run_dir, "", num_processes=1) == (0, "hello from 0 1 single\n", "")


def heed_every_signal() -> None:
    """The tests themselves may run under nohup or in the background."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


SAVE_ON_SIGNAL = """
def save(number, frame):
    Path(run_dir, f"saved_{process.rank}").write_text(signal.Signals(number).name)
    fail(75, "saved at step 8; the same command goes on from there")

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, save)
Path(run_dir, f"ready_{process.rank}").touch()
print("ready", flush=True)
while True:
    signal.pause()
"""


def _wait_until_ready(process: subprocess.Popen[str], run_dir: Path, num_processes: int) -> None:
    assert process.stdout is not None
    while not all((run_dir / f"ready_{rank}").exists() for rank in range(num_processes)):
        assert process.poll() is None
        os.sched_yield()


@pytest.mark.parametrize(
    ("number", "num_processes"),
    [(signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGUSR1, 2), (signal.SIGINT, 2)],
)
def test_a_signal_reaches_the_workers_which_save(run_dir, number, num_processes):
    with _start(run_dir, SAVE_ON_SIGNAL, num_processes=num_processes) as process:
        _wait_until_ready(process, run_dir, num_processes)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err.endswith("stopped: saved at step 8; the same command goes on from there\n")
    for rank in range(num_processes):
        assert (run_dir / f"saved_{rank}").read_text() == number.name


def test_a_signal_that_nohup_has_ignored_is_not_passed_on(run_dir):
    with _start(run_dir, SAVE_ON_SIGNAL, num_processes=1, prefix=("nohup",)) as process:
        _wait_until_ready(process, run_dir, 1)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert (run_dir / "saved_0").read_text() == "SIGTERM"


def test_a_second_interrupt_kills_workers_that_do_not_stop(run_dir):
    body = """
    signal.signal(signal.SIGINT, lambda number, frame: Path(run_dir, "noted").touch())
    Path(run_dir, "pids").write_text(str(os.getpid()))
    Path(run_dir, "ready_0").touch()
    while True:
        signal.pause()
    """
    with _start(run_dir, body, num_processes=1) as process:
        _wait_until_ready(process, run_dir, 1)
        process.send_signal(signal.SIGINT)
        while not (run_dir / "noted").exists():
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not psutil.pid_exists(int((run_dir / "pids").read_text()))


def test_killing_ends_every_worker_before_it_returns(run_dir):
    worker = run_dir / "code" / "trainer" / "__main__.py"
    body = 'Path(run_dir, f"pid_{process.rank}").write_text(str(os.getpid()))\nsignal.pause()'
    worker.write_text(WORKER + body)
    script = """
import sys
from pathlib import Path

import psutil

from launcher.local import Workers, is_gone

run_dir = Path(sys.argv[1])
with Workers(run_dir, num_processes=2) as workers:
    while sum(bool(path.read_text()) for path in run_dir.glob("pid_*")) < 2:
        assert workers.running(seconds=0.1)
    processes = [psutil.Process(int(path.read_text())) for path in run_dir.glob("pid_*")]
    assert not any(map(is_gone, processes))
    workers.kill()
    assert not workers.running(seconds=0.0)
    assert len(processes) == 2 and all(map(is_gone, processes))
"""
    subprocess.run(
        [sys.executable, "-c", script, str(run_dir)],
        env=python_environment(rundir.CODE),
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize(("visible", "expected"), [("", 0), ("-1", 0), ("0,1,2", 3)])
def test_visible_gpus_are_counted(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus() == expected


def test_a_worker_ignores_a_file_of_the_users_that_is_named_like_a_package(run_dir, tmp_path):
    (tmp_path / "data.py").write_text("raise RuntimeError('not this one')")
    done = subprocess.run(
        [sys.executable, "-c", "import json, data; print(json.dumps(data.__file__))"],
        env=python_environment(run_dir / "code"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(json.loads(done.stdout)).is_relative_to(run_dir / "code")
