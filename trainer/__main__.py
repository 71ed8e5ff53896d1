"""One worker: configuration -> process -> Trainer.

Exit codes: 0 done, 2 a user's mistake, 75 stopped after saving (start me again), 77 bad numerics.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

DONE, USER_ERROR, REQUEUE, BAD_NUMERICS = 0, 2, 75, 77


def main() -> int:
    """Run one worker and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run folder's config.json")
    path = parser.parse_args().config

    from data.base import DataError
    from launcher.process import Process
    from models.base import ModelError

    from .config import RunConfig, UserError
    from .loop import BadNumericsError, Trainer

    try:
        check_origin()
        config = RunConfig.from_json(path.read_text(), where=str(path))
        complete = Trainer(config, Process.from_environment(os.environ)).run()
    except (UserError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except BadNumericsError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_NUMERICS
    return DONE if complete else REQUEUE


def check_origin() -> None:
    """Make sure that all four packages come from one folder, whatever else is installed.

    Raises:
        UserError: naming the package that does not.
    """
    import data
    import launcher
    import models

    from .config import UserError

    home = Path(__file__).resolve().parent.parent
    for package in (launcher, models, data):
        origin = Path(str(package.__file__)).resolve().parent.parent
        if origin != home:
            raise UserError(
                f"package {package.__name__} comes from {origin}, the trainer from {home}: "
                f"set PYTHONPATH={home}"
            )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort a process that tears down normally
