"""A disk that runs full, for real: a command in a mount namespace with a small tmpfs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def on_small_disk(folder: Path, command: Sequence[str], *, num_bytes: int) -> list[str]:
    """Return the command that runs `command` with an empty disk of `num_bytes` at `folder`.

    The disk is gone when the command ends. Root needs nothing for it, others a kernel that
    allows user namespaces.
    """
    mount = f'mount -t tmpfs -o size={num_bytes} tmpfs "$0" && exec "$@"'
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    return [*namespace, "sh", "-c", mount, str(folder), *command]
