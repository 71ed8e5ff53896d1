"""The checking process: what `foveate preflight` runs on every node, as a run would its workers.

Invariant: it never waits without an end, and says what it is doing before it does it, so that the
launcher knows where a process that hangs or dies has got to.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launcher.process import Process, node_name

from .config import RunConfig
from .readings import DONE, Message, Reading, failed

_GRACE = 15.0  # seconds
Check = Callable[[], Iterator[Reading]]


class Reporter:
    """Says on standard output what this process does and finds.

    What libraries print goes to standard error from here on.
    """

    def __init__(self, process: Process, environment: Mapping[str, str]) -> None:
        self.host = node_name()
        self._rank = process.rank
        job, step = (environment.get(f"SLURM_{name}_ID", "") for name in ("JOB", "STEP"))
        self._step = f"{job}.{step}" if process.kind == "slurm" else ""
        self._output = os.dup(1)
        os.dup2(2, 1)

    def doing(self, what: str, *, joint: bool = False) -> None:
        """Say what is done from now on."""
        self._say(doing=what, joint=joint)

    def found(self, reading: Reading) -> None:
        """Hand over a reading."""
        self._say(reading=reading)

    def run(self, name: str, check: Check, *, joint: bool = False) -> bool:
        """Make one check, report what it finds, an exception included, and return if it ended."""
        self.doing(name, joint=joint)
        try:
            for reading in check():
                self.found(reading)
        except Exception as error:
            self.found(failed(name, error, joint=joint))
            return False
        return True

    def _say(self, **content: Any) -> None:
        said = Message(rank=self._rank, host=self.host, step=self._step, **content)
        os.write(self._output, said.line())  # at once and whole, past any buffer


def main() -> int:
    """Make all checks of this process; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.preflight", description=__doc__)
    parser.add_argument("--config", required=True, help="the run's configuration as JSON")
    parser.add_argument("--seconds", type=float, required=True, help="time for everything")
    options = parser.parse_args()
    config = RunConfig.from_json(options.config)
    process = Process.from_environment(os.environ)
    # The launcher ends what hangs, unless it is gone itself.
    timer = threading.Timer(options.seconds + _GRACE, os._exit, [1])
    timer.daemon = True
    timer.start()
    started = time.monotonic()
    reporter = Reporter(process, os.environ)
    reporter.doing("importing torch")
    _check(reporter, config, process, doors=started + options.seconds / 2, seconds=options.seconds)
    reporter.doing(DONE)
    return 0


def _check(
    reporter: Reporter, config: RunConfig, process: Process, *, doors: float, seconds: float
) -> None:
    """Check the node, if this is its first process, then the device, then the network.

    The joint checks begin at `doors` (of the monotonic clock) without those that are not there.
    """
    from .device_checks import Device, device_kind
    from .link_checks import Meeting
    from .node_checks import checkpoint_bytes, folders, machine, sketch, versions

    try:
        model = sketch(config.model)
    except Exception as error:
        reporter.found(failed("model", error))
        return
    if process.local_rank == 0:
        reporter.run("device", device_kind)
        reporter.run("versions", versions)
        reporter.run("machine", machine)
        need = checkpoint_bytes(model, ema=config.train.ema_decay > 0)
        reporter.run("folders", lambda: folders(config, need))
    try:
        device = Device(config, process, model)
    except Exception as error:
        reporter.found(failed("device", error))
        return
    for name, check in device.checks():
        reporter.run(name, check)
    if process.world_size == 1:
        return
    reporter.doing("meeting the others", joint=True)
    try:
        meeting = Meeting(
            config, process, device.device, reporter.host, doors=doors, seconds=seconds
        )
    except Exception as error:
        reporter.found(failed("network", error, joint=True))
        return
    for name, check in meeting.checks():
        if not reporter.run(name, check, joint=True):
            return  # somebody has left: each further check would only wait for them again


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # past the clean-up of the process group, which may wait for others
