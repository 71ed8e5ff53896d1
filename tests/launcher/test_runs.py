"""`foveate runs` tells how runs stand from their folders alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import rundir, runs, slurm
from launcher.__main__ import main
from launcher.local import python_environment
from launcher.process import Failure, failure_file
from launcher.starts import Starts
from trainer import manifest
from trainer.config import UserError, override
from trainer.recipes import recipe

HOUR = 3600.0
START = {"kind": "start", "step": 0, "steps": 800, "world_size": 2, "backend": "fsdp"}
TRAIN = {"kind": "train", "loss": 2.1, "images_per_second": 640.0}


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch, tmp_path):
    """Keep out whatever cluster this machine belongs to."""
    monkeypatch.setenv("PATH", str(tmp_path))


def make_run(path: Path, *events: dict, silence: float = 0.0) -> Path:
    """Make a run folder with these lines in its metrics, silent for so many seconds."""
    rundir.prepare(override(recipe("demo"), ["--run-dir", str(path)]))
    if events:
        text = "".join(json.dumps(event | {"time": 1.0}) + "\n" for event in events)
        (path / "metrics.jsonl").write_text(text)
    age(path, silence)
    return path


def age(run_dir: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in run_dir.rglob("*"):
        os.utime(path, (then, then))


def save(run_dir: Path, step: int, **state: object) -> Path:
    """Give a run a checkpoint without files."""
    root = run_dir / "checkpoints"
    manifest.staging_folder(root, step, 0).mkdir(parents=True)
    record = {"state": {"step": step, "best": 0.0, "best_step": None} | state}
    found = manifest.Manifest(step=step, generation=0, files=(), record=record)
    return manifest.commit(root, found)


def job(state: str = "RUNNING", reason: str = "None") -> slurm.Job:
    return slurm.Job(
        id=7, array_task=None, name="run", state=state, reason=reason, nodes=(), excluded=(),
        seconds_left=None, command="",
    )  # fmt: skip


def test_a_running_run_tells_how_far_it_is_and_how_long_it_takes(tmp_path):
    run = make_run(tmp_path / "run", START, TRAIN | {"step": 300})
    save(run, 250)
    found = runs.look(run)
    assert (found.state, found.step, found.steps) == ("running", 300, 800)
    assert found.images_per_second == 640.0
    assert found.seconds_left == pytest.approx(500 * 128 / 640)
    assert found.checkpoint_step == 250
    assert 0 <= found.checkpoint_age < HOUR


def test_the_best_top1_is_that_of_the_checkpoint_or_of_an_evaluation_since(tmp_path):
    run = make_run(tmp_path / "run", START, {"kind": "eval", "step": 400, "top1": 61.5})
    save(run, 300, best=70.25, best_step=100)
    assert runs.look(run).best_top1 == 70.25
    averaged = {"kind": "eval", "step": 500, "top1": 60.0, "ema_top1": 71.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(averaged) + "\n")
    assert runs.look(run).best_top1 == 71.0


def test_a_run_that_reached_its_last_step_is_complete(tmp_path):
    end = {"kind": "end", "step": 800, "best_top1": 66.0}
    run = make_run(tmp_path / "run", START, TRAIN | {"step": 800}, end, silence=HOUR)
    found = runs.look(run)
    assert (found.state, found.step, found.seconds_left) == ("complete", 800, None)


def test_a_run_that_failed_says_why(tmp_path):
    run = make_run(tmp_path / "run", START, TRAIN | {"step": 30})
    Failure(rank=1, code=1, message="Traceback:\n  line\nRuntimeError: no memory\n").leave(run)
    found = runs.look(run)
    assert (found.state, found.why) == ("stopped", "RuntimeError: no memory")


def test_a_run_whose_job_gave_up_says_why_until_something_lives_again(tmp_path):
    run = make_run(tmp_path / "run", START, TRAIN | {"step": 30}, silence=60)
    Failure(rank=1, code=1, message="of an earlier start").leave(run)
    starts = Starts(run)
    start = starts.begin(job=7, restart=0, nodes=("a",), processes=1)
    starts.end(start, code=76, why="error: the checks of a failed", without=["a"])
    found = runs.look(run)
    assert (found.state, found.why) == ("stopped", "error: the checks of a failed")
    assert runs.look(run, [job()]).state == "running"
    age(run, 60)
    (run / "logs" / "rank_00000.log").write_text("on this machine now")
    failure_file(run).unlink()
    assert runs.look(run).state == "running"


def test_a_run_that_a_signal_stopped_is_stopped_until_it_starts_again(tmp_path):
    stop = {"kind": "stop", "step": 40}
    assert runs.look(make_run(tmp_path / "one", START, stop)).state == "stopped"
    again = make_run(tmp_path / "two", START, stop, START | {"step": 40})
    assert runs.look(again).state == "running"


def test_a_run_that_says_nothing_for_long_is_stale(tmp_path):
    run = make_run(tmp_path / "run", START, TRAIN | {"step": 30}, silence=5 * HOUR)
    found = runs.look(run)
    assert (found.state, found.why) == ("stale", "nothing heard for 5 h")
    assert runs.look(run, [job()]).state == "stale"
    # Its watchdog speaks up while a step takes long.
    (run / "logs" / "place_00000.json").write_text("{}")
    assert runs.look(run).state == "running"


def test_a_run_that_was_only_prepared_has_not_started(tmp_path):
    found = runs.look(make_run(tmp_path / "run"))
    assert (found.state, found.step, found.steps) == ("not started", None, None)


def test_a_waiting_job_makes_a_run_queued_or_requeued(tmp_path):
    run = make_run(tmp_path / "run", START, {"kind": "stop", "step": 40}, silence=5 * HOUR)
    Failure(rank=0, code=75, message="step 40 is saved").leave(run)
    waiting = job(state="PENDING", reason="Resources")
    found = runs.look(run, [waiting])
    assert (found.state, found.why, found.job) == ("queued", "Resources", 7)
    (run / "logs" / "starts.jsonl").write_text('{"job": 7}\n')
    assert runs.look(run, [waiting]).state == "requeued"


def test_damaged_folders_are_lines_like_others(tmp_path, capsys):
    make_run(tmp_path / "good", START, TRAIN | {"step": 300})
    for name, text in {"torn": '{"recipe": ', "list": "[]", "binary": "\0\0\0"}.items():
        (make_run(tmp_path / name) / "config.json").write_text(text)
    (make_run(tmp_path / "lost") / "config.json").unlink()
    (tmp_path / "lost" / "metrics.jsonl").write_text("")
    junk = make_run(tmp_path / "junk", START, TRAIN | {"step": 300})
    with (junk / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\0\n{"kind": "train", "step": "x"}\n[1]\n{"kind": "train", "st')
    (save(junk, 200) / manifest.MANIFEST).write_text("{}")
    assert runs.show(tmp_path, as_json=True) == 0
    found = {Path(run["folder"]).name: run for run in json.loads(capsys.readouterr().out)}
    assert {name for name, run in found.items() if run["state"] == "damaged"} == {
        *("torn", "list", "binary", "lost")
    }
    assert str(tmp_path / "lost" / "config.json") in found["lost"]["why"]
    assert found["junk"]["step"] == 300
    assert found["junk"]["checkpoint_step"] is None


def test_runs_are_found_in_folders_of_folders_and_behind_links(tmp_path):
    make_run(tmp_path / "a" / "deep" / "run")
    (tmp_path / "b").symlink_to(tmp_path / "a" / "deep")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    elsewhere = make_run(tmp_path / ".hidden" / "run")
    (tmp_path / "linked").symlink_to(elsewhere)
    found = {str(path.relative_to(tmp_path)) for path in runs.run_folders(tmp_path)}
    assert found == {"a/deep/run", "linked"}
    assert list(runs.run_folders(elsewhere)) == [elsewhere]


def test_a_hundred_runs_with_long_metrics_are_listed_from_a_few_kilobytes_each(tmp_path):
    middle = json.dumps(TRAIN | {"step": 5}) + "\n"
    first = make_run(tmp_path / "run_000", START)
    with (first / "metrics.jsonl").open("a") as file:
        file.write(middle * 20_000)
        file.write(json.dumps(TRAIN | {"step": 700}) + "\n")
    for number in range(1, 100):
        path = tmp_path / f"run_{number:03d}"
        path.mkdir()
        for name in ("config.json", "metrics.jsonl"):
            os.link(first / name, path / name)
    script = (
        "import sys, launcher.__main__ as m; code = m.main(['runs', sys.argv[1], '--json'])\n"
        "assert not {'torch', 'numpy', 'tyro'} & set(sys.modules)\n"
        "read = [l for l in open('/proc/self/io') if l.startswith('rchar')][0]\n"
        "print(read.split()[1], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=python_environment(rundir.CODE),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert len(found) == 100
    assert all((run["step"], run["steps"]) == (700, 800) for run in found)
    assert int(done.stderr) < 100 * 100_000 < 100 * (first / "metrics.jsonl").stat().st_size


def test_the_table_has_a_line_for_each_run(tmp_path, capsys):
    make_run(tmp_path / "one", START, TRAIN | {"step": 300})
    make_run(tmp_path / "two")
    assert main(["runs", str(tmp_path)]) == 0
    heading, one, two = capsys.readouterr().out.splitlines()
    assert heading.startswith("run ")
    assert heading.endswith("step  images/s   left  checkpoint  top-1  job  state")
    assert one.split()[1:] == ["300/800", "640", "100", "s", "-", "-", "-", "running"]
    assert two.endswith("not started")


def test_no_runs_and_no_folder_are_told_apart(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs below {tmp_path}\n"
    with pytest.raises(UserError, match="is no folder"):
        runs.show(tmp_path / "missing", as_json=False)
