"""A worker process: its place in the run, what ends it, its log, and the failure it leaves.

The place is a pure function of the environment: nothing is asked of the network, of Slurm or of
torch, so the answer is the same on a login node, in a test and in a job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from trainer import manifest
from trainer.config import UserError

USER_ERROR = 2
"""Exit code of a mistake that the user can mend."""
REQUEUE = 75
"""Exit code of workers that saved and stopped because a signal asked them to."""
BAD_NODE = 76
"""Exit code of workers one of which got stuck, and of a start one of whose nodes is not fit."""
BAD_NUMERICS = 77
"""Exit code of workers whose numbers went bad."""
STOPPED = 78
"""Exit code of workers that saved and stopped because RUN/stop asked them to."""


def stopping_signals() -> list[signal.Signals]:
    """Return the signals that ask a run to save and stop, but for those that it is to ignore.

    nohup has HUP ignored, and a shell without job control has INT ignored in the background. That
    the others are ignored concerns who started this process: USR1 ends a torchrun that heeds it.
    """
    ignored = {n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN}
    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    return [number for number in every if number not in ignored]


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of a run and where its process group meets.

    `rank` counts over the whole run and `local_rank` within a machine; `node` numbers the
    machines. `address` and `port` are rank 0's; a single process has port 0, any free port.
    """

    rank: int
    world_size: int
    local_rank: int
    node: int
    address: str
    port: int
    kind: Literal["torchrun", "slurm", "single"]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Process:
        """Read the process from torchrun's variables, else from a Slurm step's, else be alone.

        The shell of a Slurm job or allocation is no step: only what `srun` starts counts, so that
        a command typed there runs by itself instead of waiting for processes nobody starts.

        Raises:
            UserError: if a variable is missing, malformed or contradicts another.
        """
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return cls._checked(_torchrun(environment))
        if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
            return cls._checked(_slurm(environment))
        return cls(
            rank=0, world_size=1, local_rank=0, node=0, address="127.0.0.1", port=0, kind="single"
        )

    @classmethod
    def _checked(cls, process: Process) -> Process:
        if not 0 <= process.rank < process.world_size:
            raise UserError(
                f"the {process.kind} environment gives rank {process.rank} of a world of "
                f"{process.world_size}: start the worker by torchrun, srun or foveate pretrain"
            )
        return process


def _torchrun(environment: Mapping[str, str]) -> Process:
    return Process(
        rank=_integer(environment, "RANK"),
        world_size=_integer(environment, "WORLD_SIZE"),
        local_rank=_integer(environment, "LOCAL_RANK"),
        node=_integer(environment, "GROUP_RANK") if "GROUP_RANK" in environment else 0,
        address=_value(environment, "MASTER_ADDR"),
        port=_integer(environment, "MASTER_PORT"),
        kind="torchrun",
    )


def _slurm(environment: Mapping[str, str]) -> Process:
    """Read a Slurm step (https://slurm.schedmd.com/srun.html, OUTPUT ENVIRONMENT VARIABLES)."""
    nodelist = environment.get("SLURM_STEP_NODELIST") or _value(environment, "SLURM_JOB_NODELIST")
    port = str(_slurm_port(environment))
    return Process(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=_integer(environment, "SLURM_NTASKS"),
        local_rank=_integer(environment, "SLURM_LOCALID"),
        node=_integer(environment, "SLURM_NODEID"),
        # A cluster with several networks may name another interface or port than the default.
        address=environment.get("MASTER_ADDR") or expand_hosts(nodelist)[0],
        port=_integer({"MASTER_PORT": environment.get("MASTER_PORT") or port}, "MASTER_PORT"),
        kind="slurm",
    )


def _slurm_port(environment: Mapping[str, str]) -> int:
    """Return a port below the ephemeral range that all ranks of a step derive alike.

    Jobs are 31 ports apart, so that steps which run side by side in one job do not meet the next.
    A job that was requeued takes another port: ranks that Slurm has lost may hold the one before.
    """
    job, step = _integer(environment, "SLURM_JOB_ID"), _integer(environment, "SLURM_STEP_ID")
    restart = _integer({"SLURM_RESTART_COUNT": "0", **environment}, "SLURM_RESTART_COUNT")
    return 20000 + (31 * job + 7 * restart + step) % 12000


def _value(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(f"{name} is not set, though this looks like a distributed run: set it")
    return environment[name]


def _integer(environment: Mapping[str, str], name: str) -> int:
    value = _value(environment, name)
    if not re.fullmatch(r"[0-9]+", value):
        raise UserError(f"{name} is {value!r}: it must be a whole number")
    return int(value)


_RANGE = r"[0-9]+(?:-[0-9]+)?"
_BRACKET = rf"\[{_RANGE}(?:,{_RANGE})*\]"
_HOSTS = rf"(?:[^\[\],\s]|{_BRACKET})+"


def expand_hosts(nodelist: str) -> list[str]:
    """Return the hosts of a Slurm node list in its order: `n[08-10],x5` -> n08 n09 n10 x5.

    Raises:
        UserError: if the text is no node list.
    """
    if not re.fullmatch(rf"{_HOSTS}(?:,{_HOSTS})*", nodelist):
        raise UserError(f"{nodelist!r} is not a Slurm node list: expected the form node[1-3,7],x5")
    return [host for hosts in re.findall(_HOSTS, nodelist) for host in _expand(hosts)]


def _expand(hosts: str) -> list[str]:
    """Expand every bracket of one entry; the last bracket runs fastest, as in Slurm."""
    parts = re.split(rf"({_BRACKET})", hosts)
    choices = [_numbers(part[1:-1]) if part.startswith("[") else [part] for part in parts]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _numbers(ranges: str) -> list[str]:
    """Expand `08-10,3` to 08 09 10 3: the width of a range's start is kept by zero padding."""
    numbers = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise UserError(f"the Slurm node range {item} runs backwards: give the smaller first")
        numbers += [str(number).zfill(len(first)) for number in span]
    return numbers


def open_log(run_dir: Path, rank: int) -> TextIO:
    """Append this process's stderr to RUN/logs/rank_00000.log; return the stderr it had before.

    What C libraries print goes there too. Ranks above 0 have their stdout in the log as well, so
    that only rank 0 talks to the terminal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.fdopen(os.dup(2), "w", buffering=1)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    with (run_dir / "logs" / f"rank_{rank:05d}.log").open("ab") as log:
        for stream in (2,) if rank == 0 else (1, 2):
            os.dup2(log.fileno(), stream)
    return before


def node_name() -> str:
    """Return this machine's name: the one that Slurm knows it by, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def born() -> float:
    """Return when this process was made, in seconds since 1970."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc_pid_stat(5): starttime
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def stop_file(run_dir: Path) -> Path:
    """Return the file that, as long as it is there, keeps a run stopped."""
    return run_dir / "stop"


def save_file(run_dir: Path) -> Path:
    """Return the file that asks for a checkpoint; whoever made the checkpoint removes it."""
    return run_dir / "save"


def check_not_stopped(run_dir: Path) -> None:
    """Raise UserError if the run's `stop` file is there."""
    if stop_file(run_dir).exists():
        raise UserError(
            f"{stop_file(run_dir)} keeps this run stopped: remove it and start the run again"
        )


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run stopped: the rank that stopped first, its exit code and its message.

    `node` is where it stopped, under exit code 76 where the rank that got stuck is, or None where
    no one machine is to blame; several are joined by commas. `generation` is the start of the run
    that it ended, None if it did not get so far as to have a number.
    """

    rank: int
    code: int
    message: str
    node: str | None = None
    generation: int | None = None

    @property
    def said(self) -> str:
        """The message, and whether the run was stopped or something went wrong."""
        word = "stopped" if self.code in (REQUEUE, STOPPED) else "error"
        return f"{word}: {self.message}"

    def leave(self, run_dir: Path) -> None:
        """Write RUN/logs/failure.json, unless another rank did: what came first is the cause.

        Once a newer start has taken over, the file is about that one alone.
        """
        if self.generation is not None and manifest.is_stale(
            run_dir / "checkpoints", self.generation
        ):
            return
        with contextlib.suppress(OSError), failure_file(run_dir).open("x") as file:
            json.dump(dataclasses.asdict(self), file)

    @classmethod
    def read(cls, run_dir: Path) -> Failure | None:
        """Return the failure left in a run folder, or None."""
        try:
            return cls(**json.loads(failure_file(run_dir).read_text()))
        except (OSError, ValueError, TypeError):
            return None  # none was left, or the disk was too full for it


def failure_file(run_dir: Path) -> Path:
    """Return where a run's failure is left; whoever starts the run again removes it."""
    return run_dir / "logs" / "failure.json"
