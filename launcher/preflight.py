"""Checks of the nodes before a run uses them: `foveate preflight`, and the head of every job.

Owns the processes that make the checks (`trainer.preflight`) and what is made of their readings.
Invariant: the report comes within its time. A node that does not answer is a failed row of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import IO

from trainer.config import RunConfig, UserError
from trainer.readings import DONE, Reading, message

from . import container, slurm
from .local import num_gpus, python_environment, worker_environment
from .process import Process, expand_hosts, node_name
from .rundir import CODE
from .verdicts import Row, bad_hosts, judge, table

USAGE = """\
usage: foveate preflight [RECIPE] [--SECTION.SETTING VALUE ...]
       foveate preflight --config RUN/config.json

Checks all nodes of the Slurm job it is called in, else this machine: GPUs, what they compute per
second at the run's shapes, links between the nodes, the folders of the run, clocks, versions.

  RECIPE         whose shapes and folders to check with (default: transnext_base)
  --config FILE  those of a run that exists
  --nproc N      processes per node (default: as the Slurm job has tasks; one per GPU)
  --seconds S    time for everything (default: 120)
  --json FILE    write all rows there too

Exit code 1 if a node fails a check; the last line names those nodes.
"""
SECONDS = 120.0
"""Time for everything. Healthy nodes take a fraction of it, most of which is importing torch."""
_LOST = re.compile(r"(?:failed on node|Node failure on) ([^\s:]+)")
"""How srun names nodes on which it cannot start anything, or which went away meanwhile."""
_GRACE = 5.0  # seconds that srun gets to end a step that hangs


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came out: a row per check and node, and what processes said on standard error."""

    rows: list[Row]
    said: str

    @property
    def hosts(self) -> list[str]:
        """All nodes."""
        return list(dict.fromkeys(row.host for row in self.rows))

    @property
    def bad(self) -> list[str]:
        """The nodes that failed a check."""
        return bad_hosts(self.rows)

    def __str__(self) -> str:
        """The table and, as the last line, the bad nodes.

        Where processes did not come to their end, what was said last comes before it.
        """
        silent = any(row.check == "answer" for row in self.rows)
        said = [f"| {line}" for line in self.said.splitlines()[-20:]] if silent else []
        last = f"bad nodes: --exclude={','.join(self.bad)}"
        if not self.bad:
            last = "1 node is fit" if len(self.hosts) == 1 else f"{len(self.hosts)} nodes are fit"
        return "\n".join([*said, table(self.rows), last])

    def to_json(self) -> str:
        """Return everything as JSON: rows, the bad nodes, and Slurm's option that avoids them."""
        content = {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "bad": self.bad,
            "exclude": f"--exclude={','.join(self.bad)}" if self.bad else "",
        }
        return json.dumps(content, indent=1) + "\n"


def check(run_dir: Path, config: RunConfig) -> list[str]:
    """Check the nodes of this job for a run, print the table and return the bad nodes by name.

    All rows are left in RUN/logs/preflight.json.

    Raises:
        UserError: if the checks cannot be started, or if each of several nodes fails them: that is
            the fault of none, and others would fail as well.
    """
    report = examine(dataclasses.replace(config, run_dir=str(run_dir)))
    with contextlib.suppress(OSError):  # a full disk is among the rows
        (run_dir / "logs" / "preflight.json").write_text(report.to_json())
    print(report, flush=True)
    if 1 < len(report.hosts) == len(report.bad):
        raise UserError(
            f"all {len(report.bad)} nodes fail their checks (see above): mend what they have in "
            "common, or leave the checks out by --cluster.no-preflight"
        )
    return report.bad


def run(config: RunConfig, *, num_processes: int | None, seconds: float, file: Path | None) -> int:
    """Check the nodes, print the table, write the JSON file if any, and return the exit code.

    Raises:
        UserError: if the checks cannot be started, or the file not be written.
    """
    report = examine(config, num_processes=num_processes, seconds=seconds)
    print(report, flush=True)
    if file is not None:
        try:
            file.write_text(report.to_json())
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from None
    return 1 if report.bad else 0


def examine(
    config: RunConfig, *, num_processes: int | None = None, seconds: float = SECONDS
) -> Report:
    """Make all checks on the nodes of this Slurm job, or on this machine.

    Raises:
        UserError: if the checks cannot be started from here.
    """
    in_job = "SLURM_JOB_ID" in os.environ and "SLURM_JOB_NODELIST" in os.environ
    if Process.from_environment(os.environ).world_size > 1:
        raise UserError("foveate preflight starts its processes itself: run it once, without srun")
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--nproc is {num_processes}: give at least 1")
    if not seconds > 0:
        raise UserError(f"--seconds is {seconds}: give more than 0")
    worker = ["-m", "trainer.preflight", "--config", config.to_json(), "--seconds", str(seconds)]
    if in_job:
        expected = expand_hosts(os.environ["SLURM_JOB_NODELIST"])
        python = container.python(os.environ.get("FOVEATE_CONTAINER", ""), _folders(config))
        layout = _layout(num_processes, nodes=len(expected))
        # A process that dies must not end the others: they have something to say.
        srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", "--export=ALL", *layout]
        commands = [[*srun, *python, *worker]]
        environments = [python_environment(CODE)]
    else:
        count = num_processes or max(1, num_gpus())
        expected = [node_name()]
        commands = [[sys.executable, *worker]] * count
        environments = _places(count)
    hearing = listen(commands, environments, seconds=seconds)
    return Report(rows=verdict(hearing, expected), said=hearing.said)


def _layout(num_processes: int | None, *, nodes: int) -> list[str]:
    """Return srun's options for so many processes per node; by default the job's tasks count."""
    if num_processes is None:
        return []
    return [f"--ntasks-per-node={num_processes}", f"--ntasks={nodes * num_processes}"]


def _folders(config: RunConfig) -> list[str]:
    """Return what a container has to see: the run's folders, as far as they exist, and the code."""
    run_dir = Path(config.run_dir)
    above = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    named = [folder for folder in container.folders(config, above) if Path(folder).is_dir()]
    return list(dict.fromkeys([*named, str(CODE)]))


def _places(count: int) -> list[dict[str, str]]:
    """Return the environments of `count` processes on this machine."""
    shared = {
        **worker_environment(CODE, num_processes=count),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(kw_only=True)
class Heard:
    """What was heard of one process: its host and Slurm step, what it did last, its readings."""

    host: str
    step: str
    doing: str = ""
    joint: bool = False
    readings: list[Reading] = field(default_factory=list)


@dataclass(kw_only=True)
class Hearing:
    """What was heard of all processes, by rank, and on standard error: srun's complaints, for one.

    `time_is_up` says that some still ran when the time was up.
    """

    processes: dict[int, Heard] = field(default_factory=dict)
    time_is_up: bool = False
    said: str = ""

    def add(self, line: bytes) -> None:
        """Take note of one line."""
        found = message(line)
        if found is None:
            return
        heard = self.processes.setdefault(found.rank, Heard(host=found.host, step=found.step))
        if found.doing:
            heard.doing, heard.joint = found.doing, found.joint
        if found.reading is not None:
            heard.readings.append(found.reading)


def listen(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], *, seconds: float
) -> Hearing:
    """Run the commands, and return what their processes said until all ended or time is up.

    Raises:
        UserError: if a command cannot be started.
    """
    hearing = Hearing()
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as said, open(reading, "rb", buffering=0) as pipe:
        running: list[subprocess.Popen[bytes]] = []
        try:
            for command, environment in zip(commands, environments, strict=True):
                running.append(_start(command, environment, writing, said))
        finally:
            os.close(writing)
        hearing.time_is_up = not _read(pipe, hearing, time.monotonic() + seconds)
        _end(running, {heard.step for heard in hearing.processes.values() if heard.step})
        said.seek(0)
        hearing.said = said.read().decode(errors="replace")
    return hearing


def _start(
    command: Sequence[str], environment: Mapping[str, str], output: int, said: IO[bytes]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=said,
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on this machine, though this is a Slurm job"
        ) from None


def _read(pipe: RawIOBase, hearing: Hearing, deadline: float) -> bool:
    """Read lines until every process has closed the pipe; return False if time is up before."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            part = pipe.read(2**16)
            if not part:
                return True
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                hearing.add(line)
    return False


def _end(running: Sequence[subprocess.Popen[bytes]], steps: Collection[str]) -> None:
    """End processes that still run; a Slurm step on its nodes too, as far as they listen."""
    late = [process for process in running if process.poll() is None]
    for step in steps if late else ():
        with contextlib.suppress(UserError):  # what matters is the report
            slurm.run(["scancel", "--signal=KILL", step])
    for process in late:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE if steps else 0.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def verdict(hearing: Hearing, expected: Sequence[str]) -> list[Row]:
    """Return the rows: first of nodes that did not answer to the end, then of all readings.

    Raises:
        UserError: if no process has said a word, and Slurm does not say which nodes are to blame.
    """
    lost = [host for found in _LOST.findall(hearing.said) for host in expand_hosts(found)]
    if not hearing.processes and not lost:
        said = " ".join(hearing.said.split())[-1000:] or "they said nothing"
        raise UserError(f"the checks did not start on {', '.join(expected)}: {said}")
    processes = [hearing.processes[rank] for rank in sorted(hearing.processes)]
    rows = _silent(hearing, processes, expected, lost)
    readings = [(heard.host, reading) for heard in processes for reading in heard.readings]
    return [*rows, *judge(readings, silent=bad_hosts(rows))]


def _silent(
    hearing: Hearing, processes: Sequence[Heard], expected: Sequence[str], lost: Sequence[str]
) -> list[Row]:
    """Return a row for each node that did not answer, or not to the end.

    Not to blame is who waits for another that is missing, and whose step Slurm ends because it has
    lost another node.
    """
    known = {heard.host for heard in processes}
    how = "hangs in" if hearing.time_is_up else "died in"
    late = [heard for heard in processes if heard.doing != DONE]
    found = [(host, "Slurm has lost it") for host in lost]
    found += [(host, "does not answer") for host in expected if host not in {*known, *lost}]
    found += [(heard.host, f"{how}: {heard.doing}") for heard in late]
    missing = {host for host in expected if host not in known}
    missing |= {heard.host for heard in late if not heard.joint}
    blamed = lost or missing or {heard.host for heard in late}
    return [
        Row(status="fail" if host in blamed else "warn", check="answer", host=host, value=value)
        for host, value in dict.fromkeys(found)
    ]
