"""The front door: `foveate COMMAND …`.

Every command is imported when it is asked for, and nothing here imports torch, so that help and
mistakes are answered at once, on a login node too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Never

from trainer.config import RunConfig, UserError, nearest

USAGE = """\
usage: foveate COMMAND ...

commands:
  pretrain RECIPE   train a backbone on this machine; the same command again continues the run
  preflight         check the nodes of a job, or this machine, before a run
  submit RECIPE     train it on a Slurm cluster: one job, a chain of them or a sweep
  runs [FOLDER]     list the runs below a folder (default: runs) and how they stand
  finetune TASK     classify, probe, detect or segment with pretrained weights
  export RUN        write a model for timm, transformers, ONNX or torch; --verify DIR checks one
  export RUN        write a finished run as a bundle for another library
  evaluate SOURCE   measure weights on ImageNet, its V2, A, R, Sketch, C and ReaL, or your images
  explain IMAGE     draw what a network sees: receptive fields and where it attends
  ckpt              list, verify, compare and remove the checkpoints of a run
  data              fetch, pack, index, verify data sets; check, show, bench, doctor what runs see
  replay RUN        make one step of a run again, and name the tensor that went bad
  demo              pretrain on CIFAR-10 in minutes, crash, resume and export

foveate COMMAND --help says more.
"""


_USUAL = "transnext_base"  # the recipe whose shapes nodes are checked with if none is named


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> Never:
        raise UserError(f"{message} ({self.prog} --help says more)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a user's mistake, else the workers'."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _run(arguments: Sequence[str] | None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands: dict[str, Callable[[list[str]], int]] = {
        "pretrain": pretrain,
        "preflight": preflight,
        "submit": submit,
        "runs": runs,
        "finetune": finetune,
        "export": lambda rest: python_module("trainer.exports", rest),
        "evaluate": lambda rest: python_module("trainer.evaluation", rest),
        "explain": lambda rest: python_module("trainer.explain", rest),
        "ckpt": checkpoints,
        "data": data,
        "replay": replay,
        "demo": demo,
    }
    try:
        if name in ("-h", "--help", "help"):
            print(USAGE, end="")
            return 0
        if name not in commands:
            near = nearest(name, list(commands))
            raise UserError(f"unknown command {name}{near} (known: {', '.join(commands)})")
        return commands[name](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def pretrain(arguments: list[str]) -> int:
    """Train a recipe with its overrides on this machine, or print its configuration."""
    from trainer.config import override
    from trainer.recipes import RECIPES, recipe

    parser = _Parser(prog="foveate pretrain RECIPE", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise UserError(f"which recipe? foveate pretrain RECIPE (known: {', '.join(RECIPES)})")
        print(_pretrain_help())
        return 0
    config = recipe(arguments[0])
    options, overrides = parser.parse_known_args(arguments[1:])
    if {"-h", "--help"} & set(overrides):
        _print_settings(config)
        return 0
    config = override(config, overrides)
    if options.print_config:
        print(config.describe(), end="")
        return 0
    if options.prepare:
        return _prepare(config)
    return _start(config, num_processes=options.nproc)


def _prepare(config: RunConfig) -> int:
    from . import rundir

    run_dir = rundir.prepare(config)
    print(f"export PYTHONPATH={shlex.quote(str(run_dir / 'code'))} PYTHONSAFEPATH=1")
    print(f"srun python -m trainer --config {shlex.quote(str(run_dir / 'config.json'))}")
    return 0


def _start(config: RunConfig, *, num_processes: int | None) -> int:
    from . import local, rundir
    from .process import Process, born

    if Process.from_environment(os.environ).world_size > 1:
        raise UserError(
            "foveate pretrain starts its workers itself: run it once, without torchrun or srun, "
            "or see foveate pretrain RECIPE --prepare"
        )
    if num_processes is None:
        num_processes = max(1, local.num_gpus())
    if num_processes < 1:
        raise UserError(f"--nproc is {num_processes}: give at least 1")
    config.check_world(num_processes)
    run_dir = rundir.prepare(config)
    # The workers go on from here in their account of where the time went.
    os.environ["FOVEATE_STARTED"] = f"launcher={born():.2f},folder={time.time():.2f}"
    print(f"{config.recipe} in {run_dir}, {num_processes} processes", flush=True)
    return local.launch(run_dir, num_processes=num_processes)


def finetune(arguments: list[str]) -> int:
    """Put pretrained weights to use."""
    from . import finetune as tasks

    return tasks.run(arguments, pretrain=pretrain, python=python_module)


def preflight(arguments: list[str]) -> int:
    """Check the nodes of this job, or this machine, for a run."""
    from trainer.config import RunConfig, override
    from trainer.recipes import recipe

    from . import preflight as checks
    from . import rundir

    if {"-h", "--help"} & set(arguments):
        print(checks.USAGE, end="")
        return 0
    parser = _Parser(prog="foveate preflight", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--seconds", type=float, default=checks.SECONDS)
    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    options, overrides = parser.parse_known_args(arguments[len(named) :])
    if options.config is not None and named:
        raise UserError(f"give --config or a recipe, not both: {options.config} and {named[0]}")
    config = RunConfig.read(options.config) if options.config else recipe(*named or [_USUAL])
    if overrides:
        config = override(config, overrides)
    return checks.run(
        rundir.absolute(config),
        num_processes=options.nproc,
        seconds=options.seconds,
        file=options.json,
    )


def submit(arguments: list[str]) -> int:
    """Put a recipe with its overrides into Slurm's queue."""
    from . import submit as command
    from .resources import Resources

    if not arguments or {"-h", "--help"} & set(arguments):
        print(command.USAGE, end="")
        return 0
    parser = _Parser(prog="foveate submit RECIPE", add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--ntasks-per-node", type=int)
    parser.add_argument("--cpus-per-task", type=int)
    for name in ("time", "partition", "account", "qos", "mem", "constraint"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--sbatch", action="append", default=[])
    parser.add_argument("--chain", type=int, default=1)
    parser.add_argument("--sweep", action="append", default=[])
    parser.add_argument("--dry-run", action="store_true")
    options, overrides = parser.parse_known_args(arguments[1:])
    how = {name: vars(options).pop(name) for name in ("chain", "sweep", "dry_run")}
    resources = Resources(**vars(options))
    return command.submit([arguments[0], *overrides], resources, **how)


def runs(arguments: list[str]) -> int:
    """List the runs below a folder."""
    from .runs import show

    parser = _Parser(prog="foveate runs", allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--json", action="store_true", help="print the runs as JSON")
    try:
        options = parser.parse_args(arguments)
    except SystemExit:  # after --help
        return 0
    return show(options.folder, as_json=options.json)


def checkpoints(arguments: list[str]) -> int:
    """Look at the checkpoints of a run, or remove some."""
    from . import checkpoints as commands

    if not arguments or {"-h", "--help"} & set(arguments):
        print(commands.USAGE, end="")
        return 0
    parser = _Parser(prog="foveate ckpt", add_help=False, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, prog="foveate ckpt")
    for action in ("ls", "verify", "rm"):
        actions.add_parser(action, allow_abbrev=False).add_argument("run", type=Path)
    actions.choices["rm"].add_argument("steps", type=int, nargs="+", metavar="STEP")
    actions.choices["rm"].add_argument("--force", action="store_true")
    compare = actions.add_parser("diff", allow_abbrev=False)
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    try:
        match options.action:
            case "ls":
                return commands.ls(options.run)
            case "verify":
                return commands.verify(options.run)
            case "diff":
                return commands.diff(options.first, options.second)
            case _:
                return commands.remove(options.run, options.steps, force=options.force)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


def data(arguments: list[str]) -> int:
    """Make data sets ready, or look at them as a run does."""
    looks = arguments[:1] in (["check"], ["show"], ["bench"], ["doctor"])
    return python_module("trainer.data_tools" if looks else "data", arguments)


def replay(arguments: list[str]) -> int:
    """Make a step of a run again, by the code that the run has frozen."""
    frozen = [Path(word) / "code" for word in arguments if (Path(word) / "code").is_dir()]
    return python_module("trainer.replay", arguments, code=frozen[0] if frozen else None)


def demo(arguments: list[str]) -> int:
    """Run the demonstration."""
    from .demo import run

    if {"-h", "--help"} & set(arguments):
        print(f"usage: foveate demo [--SECTION.SETTING VALUE ...]\n\n{run.__doc__}")
        return 0
    return run(arguments)


def python_module(module: str, arguments: list[str], *, code: Path | None = None) -> int:
    """Become `python -m MODULE …`: that program needs torch, which this one must not import."""
    from .local import python_environment
    from .rundir import CODE

    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, python_environment(code or CODE))


def _pretrain_help() -> str:
    from trainer.recipes import RECIPES

    recipes = (f"  {name:22}{item.__doc__}" for name, item in RECIPES.items())
    return "\n".join(
        [
            "usage: foveate pretrain RECIPE [options]",
            "",
            "Starting the same run folder again continues the run.",
            "",
            "recipes:",
            *recipes,
            "",
            "options:",
            "  --nproc N             processes on this machine (default: one per GPU, or one)",
            "  --print-config        print the configuration as JSON and stop",
            "  --prepare             make the run folder, print how srun starts workers, and stop",
            "  --run-dir DIR         the run folder (default: runs/RECIPE)",
            "  --SECTION.SETTING     any other setting, such as --optim.lr 2e-3",
            "",
            "foveate pretrain RECIPE --help lists all settings with the recipe's values.",
        ]
    )


def _print_settings(config: RunConfig) -> None:
    """Print every setting with the recipe's value; tyro reads what they mean from the source."""
    import tyro

    prog = f"foveate pretrain {config.recipe} [--nproc N] [--print-config] [--prepare]"
    with contextlib.suppress(SystemExit):
        tyro.cli(RunConfig, default=config, args=["--help"], prog=prog)


if __name__ == "__main__":
    sys.exit(main())
