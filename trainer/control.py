"""Control: what reaches a start of a run through the run's folder.

Somebody may ask there for a stop or a checkpoint, and a newer start may have taken the folder over:
a node that was given up as lost can come back. Invariant: a look costs the file server a few small
requests, so only rank 0 looks, and by the clock; the ranks' vote carries what it saw.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from launcher.process import save_file, stop_file

from . import manifest


class Control:
    """The files `stop`, `save` and `checkpoints/generation` of a run, for its start `generation`.

    `stop`, `save` and `stale` say what the last look saw: that the run is to stop, that a
    checkpoint is asked for, that the folder belongs to a newer start.
    """

    SECONDS = 5.0
    """Between two looks."""

    def __init__(self, run_dir: Path, *, generation: int) -> None:
        self.run_dir = run_dir
        self.generation = generation
        self.stop = self.save = self.stale = False
        self._next = 0.0

    def look(self) -> None:
        """Look at the files, if it is time to."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + self.SECONDS
        # Ranks that leave do not come back, and a file server that is silent asks for nothing.
        self.stop = self.stop or os.path.isfile(stop_file(self.run_dir))
        self.save = os.path.isfile(save_file(self.run_dir))
        self.owns_folder()

    def owns_folder(self) -> bool:
        """Return whether this is still the newest start, the only one that may write."""
        self.stale = self.stale or manifest.is_stale(self._checkpoints, self.generation)
        return not self.stale

    def fenced(self) -> manifest.Fenced:
        """Return the error that ends this start, which a newer one has taken over from."""
        return manifest.fenced(self._checkpoints, self.generation)

    def saved(self) -> None:
        """Note that the checkpoint which was asked for is there."""
        self.save = False
        save_file(self.run_dir).unlink(missing_ok=True)

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"
