"""`foveate submit`: a run, a chain of jobs or a sweep, checked, frozen and put into Slurm's queue.

Owns how a job script comes about. Invariants: nothing is made before all that can be checked is;
what a user typed stands in the script's commands as `shlex.quote` has it, and in its #SBATCH lines,
which no shell reads, only as far as a pattern allows.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config import RunConfig, UserError, override
from trainer.recipes import recipe

from . import rundir, slurm
from .local import python_environment
from .process import check_not_stopped
from .resources import WARNING, Resources
from .runs import SCRIPT, SWEEP_SCRIPT, Queue, look
from .table import table

USAGE = """\
usage: foveate submit RECIPE --nodes N [options] [--SECTION.SETTING VALUE ...]

Checks the settings and the data, makes the run folder, and submits RUN/job.sbatch to Slurm. The
same command again, or sbatch RUN/job.sbatch, goes on with the run.

  --nodes N             machines
  --gpus-per-node N     GPUs on each, with a process for every one (default: 8)
  --ntasks-per-node N   processes on each, where they are not as many as its GPUs
  --cpus-per-task N     cores of a process (default: data.num_workers)
  --time LIMIT          minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, and so on
  --partition, --account, --qos, --mem, --constraint VALUE
                        as for sbatch, which also reads SBATCH_PARTITION and so on
  --sbatch NAME=VALUE   any other option of sbatch, as often as you like
  --chain N             N jobs one after another, none of which is queued again
  --sweep SETTING=VALUE,VALUE
                        an array with a run for each value; for each combination if given twice
  --dry-run             print the scripts and make nothing

foveate pretrain RECIPE --help lists all settings with the recipe's values.
"""

TEMPLATE = rundir.CODE / "slurm" / "job.sbatch.in"
ENVIRONMENT = Path("slurm", "env.sh")
"""What a job's shell sets, in the checkout and in the run's frozen code."""
_VALUE = r"[\w .,:+=@%*&|!()\[\]/~-]+"
"""What an option of Slurm may hold: no quote, backslash or line break, which would end it early."""
_PATH = r"[\w .,:+=@/~-]+"
"""What the path of a run may hold: in paths of logs, Slurm reads % and backslash in its own way."""
_OWN = (
    *("array", "chdir", "dependency", "requeue", "no-requeue"),
    *("wrap", "wait", "parsable", "test-only", "help", "usage", "version"),
)
"""Options of sbatch, beside those that are set here, that would make it do something else."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run as it is submitted: `arguments` is what the driver is told, the recipe first.

    `values` are those of its settings in which it differs from the other runs of a sweep.
    """

    config: RunConfig
    arguments: tuple[str, ...]
    values: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run folder, absolute."""
        return Path(self.config.run_dir)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A batch script: where it is kept, sbatch's options by name, and its text."""

    path: Path
    options: Mapping[str, str | None]
    text: str

    def write(self) -> None:
        """Write the script into its place, over one of an earlier submission.

        Raises:
            UserError: if it cannot be written.
        """
        try:
            self.path.write_text(self.text)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; mend that") from None

    @property
    def arguments(self) -> list[str]:
        """The options for sbatch's command line, where no variable of the environment wins."""
        return [f"--{name}" + ("" if v is None else f"={v}") for name, v in self.options.items()]


def submit(
    arguments: Sequence[str],
    resources: Resources,
    *,
    chain: int = 1,
    sweep: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Submit a recipe with its overrides, `arguments`; print what to watch, and return 0.

    `chain` is how many jobs follow one another; `sweep` holds settings as NAME=VALUE,VALUE, of
    whose product each makes a run of its own. A dry run prints the scripts and makes nothing.

    Raises:
        UserError: for anything that can be seen to be wrong before the job starts.
    """
    if chain < 1:
        raise UserError(f"--chain is {chain}: give at least 1")
    if chain > 1 and sweep:
        raise UserError("--chain and --sweep do not go together: leave one of them out")
    resources.check()
    jobs = list(_grid(arguments, sweep)) if sweep else [_job(arguments)]
    for job in jobs:
        job.config.check_world(resources.nodes * resources.num_tasks)
    scripts = [_job_script(job, resources, is_chained=chain > 1) for job in jobs]
    submitted = _sweep_script(jobs, resources) if sweep else scripts[0]
    if dry_run:
        _check_data(jobs)
        print("\n".join(item.text for item in (*([submitted] if sweep else []), *scripts)), end="")
        return 0
    _check_free(jobs)
    slurm.run(["sbatch", "--test-only", *submitted.arguments, "--wrap=true"])
    _check_data(jobs)
    for job, script in zip(jobs, scripts, strict=True):
        _freeze_environment(rundir.prepare(job.config) / "code")
        script.write()
    submitted.write()
    ids: list[int] = []
    for _ in range(chain):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        ids.append(slurm.submit([*submitted.arguments, *after, str(submitted.path)]))
    print(_sweep_report(jobs, ids[0]) if sweep else _report(jobs[0], ids, resources))
    return 0


def _grid(arguments: Sequence[str], sweep: Sequence[str]) -> Iterator[Job]:
    """Yield a job for each combination of the values that `sweep` gives settings."""
    axes = []
    for item in sweep:
        name, _, values = item.partition("=")
        if not name or not all(value.split() for value in values.split(",")):
            raise UserError(f"--sweep {item}: give SETTING=VALUE,VALUE, such as optim.lr=1e-3,2e-3")
        axes.append([(name.removeprefix("--"), value) for value in values.split(",")])
    for number, settings in enumerate(itertools.product(*axes)):
        yield _job(arguments, number=number, settings=settings)


def _job(
    arguments: Sequence[str],
    *,
    number: int | None = None,
    settings: Sequence[tuple[str, str]] = (),
) -> Job:
    """Return the job of a recipe with its overrides: alone, or of a sweep by its number there."""
    words = [*arguments]
    for name, value in settings:
        words += [f"--{name}", *value.split()]
    config = override(recipe(words[0]), words[1:])
    run_dir = os.path.abspath(config.run_dir) + ("" if number is None else f"-{number}")
    if not re.fullmatch(_PATH, run_dir):
        raise UserError(
            f"the run folder {run_dir!r} has characters that paths of Slurm's logs must not have: "
            "use letters, digits, spaces and . , : + = @ ~ - _"
        )
    return Job(
        config=rundir.absolute(replace(config, run_dir=run_dir)),
        arguments=(*words, "--run-dir", run_dir),
        values=tuple(f"{name} {value}" for name, value in settings),
    )


def _job_script(job: Job, resources: Resources, *, is_chained: bool) -> Script:
    """Return the script in a run's folder. A chain goes on by its next job instead of a requeue."""
    again = "no-requeue" if is_chained else "requeue"
    options = _options(job, resources, log=f"{job.run_dir}/logs/slurm-%j.out", again=again)
    values = {
        "OPTIONS": _lines(options),
        "FOLDER": shlex.quote(os.getcwd()),
        "VENV": shlex.quote(os.environ.get("FOVEATE_VENV") or sys.prefix),
        "ENVIRONMENT": shlex.quote(str(job.run_dir / "code" / ENVIRONMENT)),
        "ARGUMENTS": shlex.join(job.arguments),
    }
    # In one pass: what a value holds is never taken for the name of another.
    text = re.sub("@([A-Z]+)@", lambda found: values[found[1]], _template())
    return Script(path=job.run_dir / SCRIPT, options=options, text=text)


def _template() -> str:
    """Read the job script's template, which frozen code and installed packages come without."""
    try:
        return TEMPLATE.read_text()
    except FileNotFoundError:
        raise UserError(
            f"{TEMPLATE} is missing: submit from a checkout; a run that was submitted goes on by "
            f"sbatch RUN/{SCRIPT}"
        ) from None


def _freeze_environment(code: Path) -> None:
    """Put what the job's shell sets beside a run's code, unless an earlier start did."""
    if not (code / ENVIRONMENT).exists():
        (code / ENVIRONMENT).parent.mkdir(exist_ok=True)
        shutil.copy(rundir.CODE / ENVIRONMENT, code / ENVIRONMENT)


def _sweep_script(jobs: Sequence[Job], resources: Resources) -> Script:
    """Return the script of an array whose tasks each become the job of their run."""
    shared = str(jobs[0].run_dir).removesuffix("-0")
    options = {
        **_options(jobs[0], resources, log=f"{shared}-%a/logs/slurm-%A_%a.out", again="requeue"),
        "job-name": Path(shared).name,
        "array": f"0-{len(jobs) - 1}",
    }
    command = f'exec bash {shlex.quote(shared)}-"$SLURM_ARRAY_TASK_ID"/{SCRIPT}'
    text = f"#!/bin/bash\n{_lines(options)}\n{command}\n"
    return Script(path=Path(shared + SWEEP_SCRIPT), options=options, text=text)


def _options(job: Job, resources: Resources, *, log: str, again: str) -> dict[str, str | None]:
    """Return sbatch's options by name, each checked."""
    options: dict[str, str | None] = {
        "job-name": job.run_dir.name,
        **resources.options(job.config.data.num_workers),
        "signal": f"B:USR1@{WARNING}",
        again: None,
        "open-mode": "append",
        "output": log,
    }
    for item in resources.sbatch:
        name, has_value, value = item.removeprefix("--").partition("=")
        is_ours = name in _OWN or (name in options and name != "signal")
        if is_ours or not re.fullmatch("[a-z][a-z-]*", name):
            raise UserError(
                f"--sbatch {item}: give another option of sbatch as NAME=VALUE, such as "
                "--sbatch reservation=mine"
            )
        options[name] = value if has_value else None
    for name, found in options.items():
        if found is not None and not re.fullmatch(_VALUE, found):
            raise UserError(f"--{name} is {found!r}: Slurm's options hold no such characters")
    return options


def _lines(options: Mapping[str, str | None]) -> str:
    def spell(value: str) -> str:
        return value if re.fullmatch(r"[\w.,:=@%/-]+", value) else f'"{value}"'

    return "\n".join(
        f"#SBATCH --{name}" + ("" if value is None else f"={spell(value)}")
        for name, value in options.items()
    )


def _check_free(jobs: Sequence[Job]) -> None:
    """Raise UserError if a run is in the queue, has been told to stop, or all are complete."""
    queue = Queue(slurm.queue())
    for job in jobs:
        for other in queue.of(job.run_dir):
            raise UserError(
                f"{job.run_dir} is job {other.id} already, {other.state}: wait for it, or "
                f"scancel {other.id}"
            )
        check_not_stopped(job.run_dir)
    if all(look(job.run_dir).state == "complete" for job in jobs):
        raise UserError(f"{jobs[0].run_dir} is complete: give another --run-dir to train anew")


def _check_data(jobs: Sequence[Job]) -> None:
    """Open the data as the runs will, in a process that has torch; runs of a sweep share most."""
    different: dict[object, Job] = {}
    for job in jobs:
        config = job.config
        different[config.data, config.train.batch_size, config.model.num_classes] = job
    for job in different.values():
        done = subprocess.run(
            [sys.executable, "-m", "trainer.data_tools", "check", *job.arguments],
            env=python_environment(rundir.CODE),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise UserError(f"the data of {job.run_dir.name}: {said.removeprefix('error: ')}")


def _report(job: Job, ids: Sequence[int], resources: Resources) -> str:
    """Say what was submitted, how to watch it and how to stop it."""
    numbers = [*map(str, ids)]
    log = job.run_dir / "logs" / f"slurm-{ids[0]}.out"
    return "\n".join(
        [
            f"job {', then '.join(numbers)}: {job.config.recipe} on {resources.nodes} nodes with "
            f"{resources.num_tasks} processes each",
            f"run folder  {job.run_dir}",
            f"log         {log}",
            f"watch       foveate runs {shlex.quote(str(job.run_dir))}",
            f"            tail -F {shlex.quote(str(log))}",
            f"stop        scancel {' '.join(numbers)}",
        ]
    )


def _sweep_report(jobs: Sequence[Job], array: int) -> str:
    """Say which job of an array is which run."""
    rows = [("job", "settings", "run folder")]
    for task, job in enumerate(jobs):
        rows.append((f"{array}_{task}", ", ".join(job.values), str(job.run_dir)))
    folder = shlex.quote(str(jobs[0].run_dir.parent))
    lines = [
        table(rows, left=(0, 1, 2)),
        f"watch  foveate runs {folder}",
        f"stop   scancel {array}",
    ]
    return "\n".join(lines)
