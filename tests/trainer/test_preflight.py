"""The checks themselves: nvidia-smi's answers as recorded, folders and links for real."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.local import python_environment
from launcher.process import Process
from launcher.rundir import CODE
from tests.dist import free_port, prepared_context
from trainer import nvidia_smi
from trainer.config import override
from trainer.link_checks import Meeting, ring
from trainer.node_checks import checkpoint_bytes, existing, folders, machine, sketch, versions
from trainer.outliers import usual
from trainer.readings import DONE, Message, Reading, failed, message
from trainer.recipes import recipe

PATIENCE = 600
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of unshare(2)


def config_in(folder, *arguments):
    return override(
        recipe("transnext_micro"),
        ["--model.name", "transnext_pico", "--run-dir", str(folder), *arguments],
    )


# Lines.


@settings(deadline=None)
@given(st.text(), st.floats(allow_nan=False) | st.text(max_size=50))
def test_a_message_is_one_line_that_is_read_back(text, value):
    said = Message(rank=3, host=text, step="7.0", reading=Reading(check=text, value=value))
    line = said.line()
    assert line.count(b"\n") == 1
    assert message(line[:-1]) == said


@pytest.mark.parametrize("line", [b"", b"[W1] hello", b"{}", b"7", b'{"reading": 3}', b"\xff{"])
def test_anything_else_is_no_message(line):
    assert message(line) is None


@settings(deadline=None)
@given(st.text(max_size=2000))
def test_the_line_of_an_error_is_written_in_one_piece(text):
    reading = failed("folder", RuntimeError(text))
    assert len(Message(rank=0, host="n" * 64, reading=reading).line()) < 4096  # PIPE_BUF


def test_equal_values_may_still_differ_by_their_share():
    assert usual([2.0, 2.0, 2.0, 50.0], share=0.1) == (2.0, 0.2)


# nvidia-smi: text in its documented form, not taken from a machine.

STATE = "550.54.15, 41, 1980, 1980, 0, 0x0000000000000000\n"


def read(text):
    return {r.check: r for r in nvidia_smi.state_readings(text, "GPU 3")}


def test_the_state_of_a_good_gpu_is_read():
    found = read(STATE)
    assert found["driver"] == Reading(
        check="driver", value="550.54.15", better="same", worst="warn"
    )
    assert (found["temperature"].value, found["clock of GPU"].value) == (41.0, 1980.0)
    assert found["ECC errors"].value == 0.0
    assert found["throttling"].error == ""
    assert {r.where for r in found.values()} == {"", "GPU 3"}


def test_what_a_gpu_does_not_know_has_no_row():
    found = read("470.1, [N/A], [Not Supported], [N/A], [N/A], [N/A]")
    assert list(found) == ["driver"]


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ("0x0000000000000000", ""),
        ("0x0000000000000001", ""),  # idle
        ("0x0000000000000004", ""),  # the power cap, as under any load
        ("0x0000000000000008", "the hardware slows it down"),
        ("0x0000000000000020", "it is too hot for its clock"),
        ("0x0000000000000084", "the power supply slows it down"),
        ("0x0000000000000048", "the hardware slows it down; the hardware slows it down for heat"),
    ],
)
def test_throttling_is_a_fault_but_idling_and_the_power_cap_are_not(bits, said):
    assert read(STATE.replace("0x0000000000000000", bits))["throttling"].error == said


def test_rows_of_memory_that_wait_for_a_reset_are_a_warning_and_broken_ones_a_failure():
    def found(text):
        readings = list(nvidia_smi.row_readings(text, "GPU 0"))
        return [(bool(r.error), r.worst) for r in readings]

    assert found("No, No\n") == [(False, "fail")]
    assert found("Yes, No\n") == [(False, "fail"), (True, "warn")]
    assert found("No, Yes\n") == [(True, "fail")]
    assert found("") == []  # a GPU without spare rows


def test_who_else_holds_memory_of_a_gpu_is_named():
    (free,) = nvidia_smi.process_readings("", "GPU 1")
    assert (free.value, free.error) == (0.0, "")
    (held,) = nvidia_smi.process_readings("4711, python3, 60211\n4712, [N/A], [N/A]\n", "GPU 1")
    assert held.error == "60,211 MiB are held by python3 (4711), None (4712)"


def test_an_answer_to_another_question_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match=r"Field .* is not a valid field"):
        read('Field "clocks.sm" is not a valid field to query.')


# The node.


def test_the_machine_and_its_versions_are_told():
    found = {r.check: r for r in (*versions(), *machine())}
    assert found["torch"].value == torch.__version__
    assert found["code"].value == {r.check: r for r in versions()}["code"].value
    assert found["cores"].value == str(len(os.sched_getaffinity(0)))
    assert 0 < found["free memory"].value < 1e5
    assert found["open files"].limit == 4096


def test_folders_are_written_read_and_left_as_they_were(tmp_path):
    config = config_in(tmp_path / "not" / "yet", "--data.cache-dir", str(tmp_path / "cache"))
    found = {r.check: r for r in folders(config, checkpoint=2**30)}
    assert not any(r.error for r in found.values())
    assert found["space in run folder"].limit == 1.0
    assert found["write in run folder"].value > 0
    assert found["read in cache_dir"].value > 0
    assert os.listdir(tmp_path) == []
    assert existing(tmp_path / "not" / "yet") == tmp_path


def test_a_checkpoint_takes_twelve_bytes_a_weight_and_four_more_with_an_average():
    model = sketch(config_in("x").model)
    weights = sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())
    assert checkpoint_bytes(model, ema=False) == 12 * weights
    assert checkpoint_bytes(model, ema=True) == 16 * weights


# The nodes together.


@settings(deadline=None)
@given(st.integers(2, 200))
def test_links_of_a_turn_share_no_node_and_make_a_ring(num_nodes):
    turns = ring(num_nodes)
    for links in turns:
        ends = [end for link in links for end in link]
        assert len(ends) == len(set(ends))
    met = [sum(node in link for links in turns for link in links) for node in range(num_nodes)]
    assert set(met) == {1 if num_nodes == 2 else 2}
    assert len(turns) == (1 if num_nodes == 2 else 2 + num_nodes % 2)


def _take_part(rank, world_size, port, folder, odd):
    """Make the joint checks as one of the nodes n0, n1, ..., and write down what is found.

    Rank 4, if any, is a second process of n0. What is `odd` is rank 2: that it dies in the check of
    that name, or that its run folder is its `own`.
    """
    run_dir = folder / "run"
    if rank == 2 and odd == "own":
        ctypes.CDLL(None).unshare(_NEW_MOUNTS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(run_dir)], check=True)
    host = f"n{rank % 4}"
    place = Process(
        rank=rank, world_size=world_size, local_rank=rank // 4, node=rank % 4,
        address="127.0.0.1", port=port, kind="torchrun",
    )  # fmt: skip
    seconds = 120.0
    meeting = Meeting(
        config_in(run_dir), place, torch.device("cpu"), host,
        doors=time.monotonic() + 40, seconds=seconds,
    )  # fmt: skip
    found = []
    for name, check in meeting.checks():
        if rank == 2 and name == odd:
            os._exit(1)
        try:
            found += list(check())
        except RuntimeError as error:
            found.append(failed(name, error, joint=True))
            break
    lines = b"".join(Message(rank=rank, host=host, reading=r).line() for r in found)
    (folder / f"rank{rank}").write_bytes(lines)
    os._exit(0)


def together(folder, ranks, *, world_size=4, odd=""):
    """Return the readings of the nodes that take part, by host."""
    (folder / "run").mkdir()
    context, port = prepared_context(), free_port()
    processes = [
        context.Process(target=_take_part, args=(rank, world_size, port, folder, odd))
        for rank in ranks
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    found = {}
    for path in sorted(folder.glob("rank*")):
        for said in map(message, path.read_bytes().splitlines()):
            found.setdefault(said.host, []).append(said.reading)
    return found


@pytest.mark.slow
def test_every_link_of_the_ring_is_measured_and_clocks_are_compared(tmp_path):
    found = together(tmp_path, range(5), world_size=5)
    links = {(h, r.where) for h, rs in found.items() for r in rs if r.check == "link"}
    assert links == {("n0", "to n1"), ("n1", "to n2"), ("n2", "to n3"), ("n3", "to n0")}
    for readings in found.values():
        assert not any(r.error for r in readings), readings
        (network,) = (r for r in readings if r.check == "network")
        assert network.value > 0
        (clock,) = (r for r in readings if r.check == "clock")
        assert clock.value < clock.limit
    checks = [r.check for rs in found.values() for r in rs]
    assert (checks.count("all-reduce"), checks.count("all-reduce in node")) == (1, 1)


@pytest.mark.slow
def test_nodes_that_come_go_on_without_the_one_that_does_not(tmp_path):
    found = together(tmp_path, [0, 1, 3])
    links = {(h, r.where) for h, rs in found.items() for r in rs if r.check == "link"}
    assert links == {("n0", "to n1"), ("n1", "to n3"), ("n3", "to n0")}
    assert not any(r.error for rs in found.values() for r in rs)


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_costs_its_neighbours_one_link_each(tmp_path):
    found = together(tmp_path, range(4), odd="network")
    assert set(found) == {"n0", "n1", "n3"}
    lost = {h: [r for r in rs if r.check == "network" and r.error] for h, rs in found.items()}
    assert [len(lost[h]) for h in ("n0", "n1", "n3")] == [0, 1, 1]
    for reading in (*lost["n1"], *lost["n3"]):
        assert reading.error.startswith("no link to n2: ")
        assert (reading.joint, reading.worst) == (True, "warn")
    # What needs all of them cannot be done any more.
    assert all(rs[-1].joint and rs[-1].error for rs in found.values())


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a folder of a process's own")
def test_a_run_folder_that_is_not_shared_is_noticed(tmp_path):
    found = together(tmp_path, range(3), world_size=3, odd="own")
    errors = {h: r.error for h, rs in found.items() for r in rs if r.check == "shared run folder"}
    assert (errors["n0"], errors["n1"]) == ("", "")
    assert errors["n2"] == f"{tmp_path / 'run'} is another folder than on n0: use a shared one"
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.slow
def test_a_process_whose_first_rank_does_not_answer_says_so_and_ends(tmp_path):
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    worker = [sys.executable, "-m", "trainer.preflight", "--seconds", "100"]
    done = subprocess.run(
        [*worker, "--config", config_in(tmp_path).to_json()],
        env={**python_environment(CODE), **place, "MASTER_PORT": str(free_port())},
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    messages = [message(line) for line in done.stdout.splitlines()]
    assert messages[-1].doing == DONE
    (error,) = (m.reading for m in messages if m.reading and m.reading.error)
    assert (error.check, error.joint) == ("network", True)
    assert "rank 0 does not answer at 127.0.0.1:" in error.error
