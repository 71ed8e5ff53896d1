"""What an error means to who started a worker: an exit code and a message."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from data.base import DataError
from launcher.process import BAD_NUMERICS, USER_ERROR
from models.base import ModelError

from .config import UserError
from .guard import BadNumericsError

BUG = 1


def explain(error: Exception, run_dir: str | Path) -> tuple[int, str]:
    """Return exit code and message of an error: what its user can mend, bad numerics, or a bug."""
    if isinstance(error, (UserError, DataError, ModelError)):
        return USER_ERROR, str(error)
    if isinstance(error, BadNumericsError):
        return BAD_NUMERICS, str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return USER_ERROR, f"cannot write to {run_dir}: {error.strerror}; make room and start again"
    return BUG, "".join(traceback.format_exception(error))
