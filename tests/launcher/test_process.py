from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.process import Process, expand_hosts
from trainer.config import UserError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[09-10],big7",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head-node",
    "MASTER_PORT": "29400",
}


def test_alone_without_a_launcher():
    process = Process.from_environment({"HOME": "/root"})
    assert process == Process(
        rank=0, world_size=1, local_rank=0, node=0, address="127.0.0.1", port=0, kind="single"
    )


def test_torchrun_wins_over_the_slurm_step_it_runs_in():
    process = Process.from_environment({**SLURM, **TORCHRUN})
    assert process == Process(
        rank=3, world_size=4, local_rank=1, node=1, address="head-node", port=29400, kind="torchrun"
    )


def test_slurm_step_meets_at_the_first_host():
    process = Process.from_environment(SLURM)
    assert (process.rank, process.world_size, process.local_rank, process.node) == (9, 16, 1, 1)
    assert (process.kind, process.address) == ("slurm", "gpu09")


def test_slurm_step_on_some_of_the_jobs_nodes():
    assert Process.from_environment({**SLURM, "SLURM_STEP_NODELIST": "big7"}).address == "big7"


def test_slurm_address_and_port_can_be_given():
    given = {**SLURM, "MASTER_ADDR": "gpu09-ib", "MASTER_PORT": "29500"}
    process = Process.from_environment(given)
    assert (process.address, process.port) == ("gpu09-ib", 29500)


def test_the_shell_of_a_slurm_job_is_no_worker():
    shell = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert Process.from_environment(shell).kind == "single"


@given(job=st.integers(1, 10**9), step=st.integers(0, 30))
def test_slurm_ports_are_alike_on_all_ranks_and_apart_for_steps(job, step):
    ports = {
        Process.from_environment(
            {**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(s), "SLURM_PROCID": str(rank)}
        ).port
        for s in (step, step + 1)
        for rank in (0, 15)
    }
    assert len(ports) == 2
    assert all(20000 <= port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "sixteen"}, "SLURM_PROCID is 'sixteen'"),
        ({"SLURM_PROCID": "16"}, "rank 16 of a world of 16"),
        ({"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set"),
        ({"SLURM_JOB_NODELIST": "gpu[1-"}, "'gpu[1-' is not a Slurm node list"),
        ({"SLURM_JOB_NODELIST": "gpu[3-1]"}, "3-1 runs backwards"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_a_bad_variable_is_named(change, message):
    with pytest.raises(UserError) as error:
        Process.from_environment({**SLURM, **change})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("node[1-3,7],x5", ["node1", "node2", "node3", "node7", "x5"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("a-1.example.org,b[5]", ["a-1.example.org", "b5"]),
    ],
)
def test_node_lists(nodelist, hosts):
    assert expand_hosts(nodelist) == hosts


PREFIXES = st.from_regex(r"[a-z][a-z-]{0,5}", fullmatch=True)
RANGES = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=4
)


@given(st.lists(st.tuples(PREFIXES, RANGES), min_size=1, max_size=4))
def test_expanding_undoes_compressing(entries):
    expected, compressed = [], []
    for prefix, ranges in entries:
        texts = []
        for first, span, width in ranges:
            numbers = [str(n).zfill(width) for n in range(first, first + span + 1)]
            numbers = [n.zfill(len(numbers[0])) for n in numbers]
            texts.append(numbers[0] if span == 0 else f"{numbers[0]}-{numbers[-1]}")
            expected += [prefix + number for number in numbers]
        compressed.append(f"{prefix}[{','.join(texts)}]")
    assert expand_hosts(",".join(compressed)) == expected


@given(st.text(alphabet="ab01-,[] ", max_size=12))
def test_any_text_is_expanded_or_refused(text):
    try:
        hosts = expand_hosts(text)
    except UserError:
        return
    assert hosts
    assert all(host and not set(host) & set("[], ") for host in hosts)
