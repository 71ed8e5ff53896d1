"""Our own code for folders that have to do without us: modules joined into files of their own."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
MODEL = "foveate_model"  # the module of a bundle that holds the network
PACKAGES = ("models", "trainer", MODEL)


def joined(modules: list[str]) -> str:
    """Return the source of modules of ours and of all that they import, in one file.

    Imports among them go, since what they name is in the file already.
    """
    parts = [_rewritten(module, lambda node: "") for module in _with_dependencies(modules)]
    return "\n\n".join(("from __future__ import annotations", *parts))


def beside(module: str, package: str) -> str:
    """Return the source of one module of ours, which imports what it needs of ours from `package`.

    `package` is a module's name, with a dot before it where it is in the same folder's package.
    """
    text = _rewritten(
        module,
        lambda node: f"from {package} import {', '.join(alias.name for alias in node.names)}",
    )
    return f"from __future__ import annotations\n\n{text}"


def _with_dependencies(names: list[str]) -> list[str]:
    """Return our modules that `names` import, each after what it needs."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        for _, needed in _own_imports(name):
            visit(needed)
        if name not in ordered:
            ordered.append(name)

    for name in names:
        visit(name)
    return ordered


def _path(module: str) -> Path:
    path = HOME.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _own_imports(module: str) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Yield the `from … import …` statements of a module that name our own, with their module."""
    package = module.split(".") if _path(module).name == "__init__.py" else module.split(".")[:-1]
    for node in ast.parse(_path(module).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *filter(None, (node.module or "").split("."))])
            if target.startswith(PACKAGES):
                yield node, target


def _rewritten(module: str, replacement: Callable[[ast.ImportFrom], str]) -> str:
    """Return a module's source with its imports of our own, and of the future, replaced."""
    lines = _path(module).read_text().splitlines()
    changes = [(node, replacement(node)) for node, _ in _own_imports(module)]
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            changes.append((node, ""))
    for node, text in changes:
        for number in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[number] = ""
        lines[node.lineno - 1] = text
    return "\n".join(lines).strip()
