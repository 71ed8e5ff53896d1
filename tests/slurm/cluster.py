"""A Slurm cluster of several nodes in this machine: real daemons, a folder and ports of its own.

Each node is a slurmd in PID, mount and UTS namespaces of its own: it has its own host name, and
killing its first process is pulling the plug. Nothing of the machine's own Slurm or MUNGE is read,
so that any number of clusters run side by side, and the kernel ends every daemon whose test dies.

    with Cluster() as cluster:
        job = cluster.submit(script, "--optim.lr", "2e-3", options=["--nodes=2"], folder=tmp_path)
        cluster.wait(job, "COMPLETED")

The nodes are node1 to node4 with 64 CPUs and 8 GPUs each, none of which exists. The partitions are
`main`, and `low`, whose jobs those of `high` preempt.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

NODES = ("node1", "node2", "node3", "node4")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "setpriv")
NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PATIENCE = 900.0
"""Seconds that anything may take on a machine that does other things too."""


def missing() -> str | None:
    """Return why no cluster can be had here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: `make system` does so as root"
    if os.geteuid() != 0:
        return "only root can start the nodes of a cluster"
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode != 0:
        return "this machine gives root no namespaces"
    return None


class Cluster:
    """A running cluster; leaving the context ends all of its processes."""

    def __init__(self) -> None:
        # The path is short, for sockets, and open, which MUNGE insists on.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))
        }
        self.environment = {
            **kept,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "FOVEATE_VENV": sys.prefix,
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        with ExitStack() as undo:
            undo.callback(self.stop)
            _configure(self.folder)
            self._start("munged", "munged", "--foreground", *_munge_options(self.folder))
            wait_until((self.folder / "munge.sock").exists, "MUNGE to answer")
            self._start("slurmctld", "slurmctld", "-D")
            for node in NODES:
                self.start(node)
            wait_until(self._is_idle, "the nodes to be idle")
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process and remove the folder."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # What users do.

    def run(self, *argv: str, folder: Path | None = None) -> str:
        """Run a command as a user of the cluster does and return what it prints."""
        done = subprocess.run(
            argv, cwd=folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
        return done.stdout.strip()

    def submit(
        self, script: Path, *arguments: str, options: Sequence[str] = (), folder: Path
    ) -> int:
        """Submit a script from `folder` and return the job's id."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        return int(self.run(*command, folder=folder).split(";")[0])

    def state(self, job: int) -> str:
        """Return what Slurm says of a job, such as RUNNING or COMPLETED."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def show(self, job: int) -> dict[str, str]:
        """Return the words NAME=VALUE that Slurm shows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", str(job))))

    def wait(self, job: int, *wanted: str) -> None:
        """Wait until a job is in one of these states; one that ends otherwise is an error."""

        def is_there() -> bool:
            state = self.state(job)
            assert state in wanted or state not in ENDED, f"job {job} is {state}\n{self.diary(job)}"
            return state in wanted

        wait_until(is_there, f"job {job} to be {wanted}", lambda: self.diary(job))

    def diary(self, job: int | None = None) -> str:
        """Return how all stands, and what became of a job in its own words and the controller's."""
        seen = [self.run("squeue", "--states=all"), self.run("sinfo")]
        if job is not None:
            log = (self.folder / "slurmctld.log").read_text().splitlines()
            seen += [line for line in log if f"={job}" in line or "node" in line][-40:]
            shown = self.run("scontrol", "show", "job", str(job))
            output = Path(shown.partition("StdOut=")[2].partition("\n")[0])
            seen += output.read_text().splitlines()[-60:] if output.exists() else []
        return "\n".join(seen)

    # What happens to machines.

    def start(self, node: str) -> None:
        """Switch a node on."""
        init = (sys.executable, "-I", __file__, str(self.folder), node)
        self._start(node, *NAMESPACES, *init)

    def cut_power(self, node: str) -> None:
        """Switch a node off: every process on it is gone at once. Slurm sees it late."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def declare(self, node: str, state: str) -> None:
        """Tell Slurm what an operator would: that a node is `down`, or can `resume`."""
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    def kill_slurmd(self, node: str) -> None:
        """End the daemon of a node; what it has started runs on."""
        for process in self.processes(node, "slurmd"):
            process.kill()

    def crash_controller(self) -> None:
        """End Slurm's controller as a crash does, and start it again."""
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait()
        self._start("slurmctld", "slurmctld", "-D")

    def processes(self, node: str, *words: str) -> list[psutil.Process]:
        """Return the processes of a node whose command line has all these words."""
        found = []
        for process in psutil.Process(self._daemons[node].pid).children(recursive=True):
            try:
                if set(words) <= set(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def workers(self, node: str) -> list[psutil.Process]:
        """Return the ranks of runs on a node."""
        found = self.processes(node, "-m", "trainer", "--config")
        return [process for process in found if process.cmdline()[1:3] == ["-m", "trainer"]]

    def _start(self, name: str, *argv: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _is_idle(self) -> bool:
        for name, daemon in self._daemons.items():
            said = (self.folder / f"{name}.out").read_text
            assert daemon.poll() is None, f"{name} has ended: {said()}"
        done = subprocess.run(
            ["sinfo", "--noheader", "--partition=main", "--format=%T %D"],
            env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.split() == ["idle", str(len(NODES))]


def wait_until(
    condition: Callable[[], object], what: str, why: Callable[[], str] = lambda: ""
) -> None:
    """Wait until `condition` holds; say what was waited for, and `why`, if it never does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}\n{why()}"
        time.sleep(0.2)


def _munge_options(folder: Path) -> list[str]:
    files = ("socket", "sock"), ("key-file", "key"), ("log-file", "log"), ("pid-file", "pid")
    return [f"--{name}={folder}/munge.{end}" for name, end in (*files, ("seed-file", "seed"))]


def _configure(folder: Path) -> None:
    """Write what the daemons read."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(64))
    host = socket.gethostname()
    addresses = {node: f"127.0.0.{10 + i}" for i, node in enumerate(NODES)}
    hosts = {"localhost": "127.0.0.1", host: "127.0.0.1", **addresses}
    (folder / "hosts").write_text("".join(f"{a} {name}\n" for name, a in hosts.items()))
    for i in range(8):  # Slurm wants device files of GPUs to be such
        os.mknod(folder / f"gpu{i}", 0o20666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-7]\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "plugstack.conf").write_text("")
    first = _free_ports(len(NODES) + 1)
    lines = [
        f"NodeName={node} NodeAddr={address} Port={first + i} CPUs=64 RealMemory=64000 Gres=gpu:8"
        for i, (node, address) in enumerate(addresses.items(), start=1)
    ]
    settings = _CONFIGURATION.format(
        folder=folder, host=host, port=first, first_job=random.randrange(1, 60_000)
    )
    (folder / "slurm.conf").write_text("\n".join([settings, *lines, ""]))
    for name in ("state", "spool"):
        (folder / name).mkdir()


_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
# Ports of runs follow from job ids: those of two clusters differ.
FirstJobId={first_job}
AuthType=auth/munge
CredType=cred/munge
# So long, and a second, a requeued job waits before it starts again; Slurm takes no less than 5.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
CompleteWait=0
KillWait=20
# A cancellation is answered after KillWait; one that took longer would be sent again, and hit the
# next start of a requeued job.
MessageTimeout=40
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
PartitionName=main Nodes=node[1-4] Default=YES MaxTime=INFINITE PriorityTier=10
PartitionName=low Nodes=node[1-4] MaxTime=INFINITE PriorityTier=1
PartitionName=graceful Nodes=node[1-4] MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=node[1-4] MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF"""


def _free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row, away from those that runs choose."""
    while True:
        first = random.randrange(12_000, 19_900)
        with ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probe = probes.enter_context(socket.socket())
                    probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        return first


def _be_a_node(folder: str, node: str) -> None:
    """Run slurmd as the first process of a node's namespaces, and collect what it leaves behind."""
    socket.sethostname(node)
    subprocess.run(["mount", "--bind", f"{folder}/hosts", "/etc/hosts"], check=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["slurmd", "-D", "-N", node])
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.2)


if __name__ == "__main__":
    _be_a_node(*sys.argv[1:])
