"""Node checks as the launcher sees them: who is blamed for what; the report always comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.container import python
from launcher.local import python_environment
from launcher.preflight import Hearing, Report, check, listen, verdict
from launcher.process import node_name
from launcher.rundir import CODE
from launcher.verdicts import Row, bad_hosts, judge, table
from trainer.config import UserError, override
from trainer.readings import Message, Reading
from trainer.recipes import recipe

PATIENCE = 600


def rates(values, **judged_by):
    judged_by = {"check": "matrix product", "share": 0.2} | judged_by
    return [(f"n{i}", Reading(value=v, **judged_by)) for i, v in enumerate(values)]


# Verdicts.


@settings(deadline=None)
@given(
    value=st.floats(1e-3, 1e6),
    num_nodes=st.integers(3, 40),
    share=st.floats(0.05, 0.9),
    better=st.sampled_from(["high", "low"]),
    data=st.data(),
)
def test_one_outlier_among_equal_nodes_is_always_named(value, num_nodes, share, better, data):
    odd = data.draw(st.integers(0, num_nodes - 1))
    beyond = data.draw(st.floats(share * 1.01, 0.99))
    values = [value] * num_nodes
    values[odd] *= 1 - beyond if better == "high" else 1 + beyond
    rows = judge(rates(values, share=share, better=better))
    assert bad_hosts(rows) == [f"n{odd}"]


@settings(deadline=None)
@given(
    value=st.floats(1e-3, 1e6),
    share=st.floats(0.05, 0.9),
    better=st.sampled_from(["high", "low"]),
    noise=st.lists(st.floats(-0.49, 0.49), min_size=1, max_size=40),
)
def test_nodes_that_are_equal_but_for_noise_are_never_named(value, share, better, noise):
    rows = judge(rates([value * (1 + n * share) for n in noise], share=share, better=better))
    assert bad_hosts(judge(rates([value] * len(noise), share=share, better=better))) == []
    # Half of the share on each side of the value is within the share of any median.
    if 0.49 * share / (1 - 0.49 * share) <= share - 0.49 * share:
        assert {row.status for row in rows} == {"ok"}


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=2), st.floats(0.05, 0.9))
def test_two_nodes_are_not_held_against_each_other(values, share):
    assert {row.status for row in judge(rates(values, share=share))} == {"ok"}


@settings(deadline=None)
@given(num_nodes=st.integers(2, 30), data=st.data())
def test_a_node_with_another_version_is_named_and_equal_ones_are_not(num_nodes, data):
    def found(versions):
        readings = [
            (f"n{i}", Reading(check="torch", value=version, better="same"))
            for i, version in enumerate(versions)
        ]
        return bad_hosts(judge(readings))

    assert found(["2.14.1"] * num_nodes) == []
    # Of two nodes that differ, the first is the one to go by.
    odd = data.draw(st.integers(0 if num_nodes > 2 else 1, num_nodes - 1))
    assert found(["2.14.1" if i != odd else "2.13.0" for i in range(num_nodes)]) == [f"n{odd}"]


@pytest.mark.parametrize(("skew", "bad"), [(0.01, []), (4.9, []), (7200.0, ["n2"])])
def test_a_clock_that_is_off_is_named(skew, bad):
    rows = judge(rates([0.0, 0.001, skew], check="clock", better="low", limit=5.0, share=None))
    assert bad_hosts(rows) == bad


def test_the_tighter_of_limit_and_peers_counts_and_is_shown():
    rows = judge([*rates([1.0, 1.0, 1.0], limit=0.5), ("n3", Reading(check="other", value=0.4))])
    assert [row.limit for row in rows] == ["at least 0.8 (median 1)"] * 3 + [""]
    (row,) = judge(rates([0.4], limit=0.5))
    assert (row.status, row.limit) == ("fail", "at least 0.5")


def test_a_number_that_is_none_fails_its_limit():
    assert bad_hosts(judge(rates([float("nan")], limit=0.5))) == ["n0"]


def test_what_only_warns_does_not_make_a_node_bad():
    rows = judge(rates([1.0, 1.0, 1.0, 0.1], worst="warn"))
    assert [row.status for row in rows] == ["ok", "ok", "ok", "warn"]
    assert bad_hosts(rows) == []


def test_what_cannot_be_done_without_a_silent_node_counts_against_nobody_else():
    lost = Reading(check="network", error="no link to n2", joint=True)
    assert bad_hosts(judge([("n1", lost), ("n3", lost)], silent=["n2"])) == []
    assert bad_hosts(judge([("n1", lost)])) == ["n1"]
    own = Reading(check="run folder", error="No space left on device")
    assert bad_hosts(judge([("n1", own)], silent=["n2"])) == ["n1"]


def test_the_table_sums_up_what_is_well_and_spells_out_the_rest():
    text = table(judge(rates([1.0, 1.02, 1.0, 0.1], unit="TFLOP/s")))
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "check node found limit",
        "ok matrix product 3 nodes 1 … 1.02 TFLOP/s at least 0.8 (median 1)",
        "fail matrix product n3 0.1 TFLOP/s at least 0.8 (median 1)",
    ]


def test_the_report_gives_slurms_option_in_its_last_line_and_in_json():
    rows = judge(rates([1.0, 1.0, 1.0, 0.1, 0.1], share=0.5, limit=0.5))
    report = Report(rows=rows, said="")
    assert str(report).splitlines()[-1] == "bad nodes: --exclude=n3,n4"
    found = json.loads(report.to_json())
    assert found["exclude"] == "--exclude=n3,n4"
    assert found["bad"] == ["n3", "n4"]
    assert [Row(**row) for row in found["rows"]] == rows
    assert str(Report(rows=rows[:1], said="")).splitlines()[-1] == "1 node is fit"


# Processes that hang or die.

WORKER = """
import os, signal, sys, time
from trainer.readings import DONE, Message, Reading

rank = int(os.environ["RANK"])


def say(**content):
    os.write(1, Message(rank=rank, host=f"n{rank}", **content).line())

"""


def hear(body, *, count, seconds=60.0):
    command = [sys.executable, "-c", WORKER + textwrap.dedent(body)]
    places = [{**python_environment(CODE), "RANK": str(rank)} for rank in range(count)]
    return listen([command] * count, places, seconds=seconds)


def silent(hearing, expected):
    rows = verdict(hearing, expected)
    return {row.host: (row.status, row.value) for row in rows if row.check == "answer"}


def test_readings_of_all_processes_arrive_amid_what_libraries_print():
    hearing = hear(
        """
        os.write(1, b"[W123] a library has something to say\\n")
        for i in range(200):
            say(reading=Reading(check=f"check {i}", value=float(i), error="x" * 400))
        os.write(1, b'{"json": "but no message"}\\n')
        say(doing=DONE)
        """,
        count=4,
    )
    assert not hearing.time_is_up
    rows = verdict(hearing, [f"n{i}" for i in range(4)])
    assert [row.host for row in rows] == [f"n{i}" for i in range(4) for _ in range(200)]


def test_a_process_that_hangs_or_dies_is_a_failed_row_that_says_where():
    start = time.monotonic()
    hearing = hear(
        """
        say(doing="first")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == 2:
            say(reading=Reading(check="cores", value="2"))
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 3:
            say(doing="meeting", joint=True)
            time.sleep(3600)
        say(doing=DONE)
        """,
        count=4,
        seconds=20.0,
    )
    assert time.monotonic() - start < 3600
    found = silent(hearing, [f"n{i}" for i in range(5)])
    assert found == {
        "n4": ("fail", "does not answer"),
        "n1": ("fail", "hangs in: first"),
        "n2": ("fail", "hangs in: first"),
        "n3": ("warn", "hangs in: meeting"),  # for the others
    }


def test_processes_that_hang_in_what_they_do_together_are_all_to_blame_if_nobody_else_is():
    hearing = hear('say(doing="links", joint=True); time.sleep(3600)', count=2, seconds=10.0)
    assert {status for status, _ in silent(hearing, ["n0", "n1"]).values()} == {"fail"}


def test_a_node_that_slurm_loses_is_named_and_those_it_takes_along_are_not():
    said = "srun: error: Task launch for StepId=7.0 failed on node n2: Communication failure\n"
    hearing = Hearing(said=said)
    hearing.add(Message(rank=0, host="n1", doing="importing torch").line())
    assert silent(hearing, ["n1", "n2", "n3"]) == {
        "n2": ("fail", "Slurm has lost it"),
        "n3": ("warn", "does not answer"),
        "n1": ("warn", "died in: importing torch"),
    }
    hearing = Hearing(said="srun: error: Node failure on n[2-3]\n")
    assert bad_hosts(verdict(hearing, ["n1", "n2", "n3"])) == ["n2", "n3"]


def test_checks_that_do_not_start_at_all_end_in_one_message():
    hearing = Hearing(said="srun: error: Unable to create step for job 7: Invalid account\n")
    with pytest.raises(UserError, match=r"did not start on n1, n2: .*Invalid account"):
        verdict(hearing, ["n1", "n2"])
    with pytest.raises(UserError, match="nosuchprogram is not on this machine"):
        listen([["nosuchprogram"]], [dict(os.environ)], seconds=1.0)


def test_a_container_runs_the_checks_as_it_runs_the_workers():
    assert python("", ["/a"]) == [sys.executable]
    assert python("x.sif", ["/a", "/b"])[:5] == [
        "apptainer", "exec", "--nv", "--bind=/a", "--bind=/b",
    ]  # fmt: skip
    assert python("img", ["/a", "/b"]) == [
        "--container-image=img", "--container-mounts=/a:/a,/b:/b", "python3",
    ]  # fmt: skip


# The command.

SMALL = ["transnext_micro", "--model.name", "transnext_pico", "--model.img-size", "32"]


def foveate(*arguments, folder, within=()):
    command = [sys.executable, "-m", "launcher", "preflight", *map(str, arguments)]
    return subprocess.run(
        [*within, *command],
        cwd=folder,
        env={**python_environment(CODE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.slow
def test_this_machine_is_fit_for_a_run_of_two_processes(tmp_path):
    done = foveate(*SMALL, "--nproc", 2, "--seconds", 400, "--json", "rows.json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 node is fit"
    found = json.loads((tmp_path / "rows.json").read_text())
    rates = {row["check"]: row["value"] for row in found["rows"] if row["unit"]}
    assert rates["matrix product"] > 0
    assert rates["all-reduce in node"] > 0
    assert rates["write in run folder"] > 0
    assert (found["bad"], found["exclude"]) == ([], "")
    checks = {row["check"] for row in found["rows"]}
    assert {"torch", "numpy", "python", "code", "clock", "open files", "/dev/shm"} <= checks
    assert not checks & {"driver", "temperature", "ECC errors"}  # there is no GPU
    assert os.listdir(tmp_path) == ["rows.json"]  # no test file is left, no run folder made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"), [("size=8m", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_folder_that_takes_no_checkpoint_makes_the_node_bad(tmp_path, options, said):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    within = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(disk)]
    done = foveate(
        *SMALL, "--run-dir", disk / "run", "--seconds", 400, folder=tmp_path, within=within
    )
    assert done.returncode == 1, done.stdout + done.stderr
    *_, last = done.stdout.splitlines()
    assert last == f"bad nodes: --exclude={node_name()}"
    assert said in done.stdout


@pytest.mark.slow
def test_a_driver_is_given_the_bad_nodes_and_leaves_all_rows_in_the_run_folder(tmp_path, capsys):
    config = override(recipe(SMALL[0]), [*SMALL[1:], "--run-dir", str(tmp_path)])
    (tmp_path / "logs").mkdir()
    assert check(tmp_path, config) == []
    assert json.loads((tmp_path / "logs" / "preflight.json").read_text())["bad"] == []
    assert "1 node is fit" in capsys.readouterr().out
    impossible = override(config, ["--model.name", "transnext_bas"])
    assert check(tmp_path, impossible) == [node_name()]
    assert "transnext_base" in capsys.readouterr().out  # the nearest name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transnext_bas"], "unknown recipe transnext_bas; did you mean transnext_base?"),
        (["--config", "nowhere.json"], "nowhere.json cannot be read"),
        (["transnext_base", "--config", "x.json"], "give --config or a recipe, not both"),
        (["--nproc", "0"], "--nproc is 0: give at least 1"),
        (["--seconds", "-1"], "--seconds is -1.0: give more than 0"),
        (["--nprocs", "2"], "unknown option --nprocs"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    done = foveate(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1
