"""A virtual environment beside the project's, with one library and what that needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# uv's name of what pip reads, as in the Makefile.
_SETTINGS = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_CERT": "SSL_CERT_FILE",
}


class Environment:
    """Where Foveate is not; its packages come out of uv's cache, which `make setup` has filled."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        self._uv("venv", "--python", sys.executable, folder)

    def hold(self, *packages: str) -> None:
        """Install packages, what they need, and nothing else, in the project's versions."""
        pins = ROOT / "constraints.txt"
        where = ("--python", self.python, "--constraint", pins, "--link-mode", "hardlink")
        self._uv("pip", "install", "--exact", *where, *packages)
        # Compiles what checks import, which write nothing.
        subprocess.run([self.python, "-c", f"import {packages[0]}"], check=True)

    def _uv(self, *arguments: object) -> None:
        given = {new: os.environ[old] for old, new in _SETTINGS.items() if old in os.environ}
        if "UV_FIND_LINKS" in given:
            given["UV_FIND_LINKS"] = ",".join(given["UV_FIND_LINKS"].split())
        done = subprocess.run(
            [str(Path(sys.executable).parent / "uv"), *map(str, arguments)],
            env={**given, **os.environ}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
