"""The rules that keep the house simple: who imports whom, how large things are, what is named."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launcher", "trainer", "models", "data")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# The only files that may import a package, as prefixes of their paths.
OWNERS = {
    "deepspeed": ("trainer/backends/zero.py",),
    "ffcv": ("data/ffcv.py",),
    "fsspec": ("data/connection.py", "data/location.py"),
    "webdataset": ("data/webdataset.py", "data/pack.py"),
    "tensorboard": ("trainer/metrics.py",),
    "accelerate": ("trainer/finetune/",),
    "transformers": ("trainer/finetune/heads/", "trainer/exports/"),
    "torchvision": ("data/fetch.py", "trainer/finetune/"),
    "faster_coco_eval": ("trainer/finetune/coco_",),
    "triton": ("models/kernels/",),
}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (imported module, whether the import is relative), at any depth of the file.

    `from a import b` counts as a.b if that is a module of ours, else as a.
    """
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield (name if name in MODULES or _is_private(name) else base), node.level > 0


def _is_private(module: str) -> bool:
    return any(re.match(r"_[^_]", part) for part in module.split("."))


BUNDLE = ("foveate_model", "foveate_timm")  # inside an exported bundle: its check imports them
MODULES = {_module(path) for path in FILES}


# What a package may import of the others. The trainer knows the public side of models and data;
# launcher.process is how a worker learns its place in the run and reports its end.
ALLOWED = {
    "launcher": {
        *("trainer.config", "trainer.recipes", "trainer.sections"),
        *("trainer.manifest", "trainer.shardfile", "trainer.readings", "trainer.outliers"),
    },
    "trainer": {
        *("launcher.process", "models.registry", "models.base"),
        *("data.base", "data.pipeline", "data.augment", "data.policy", "data.color"),
        *("data.mixing", "data.randomness", "data.order", "data.ledger", "data.ffcv"),
        "data.progress",
    },
    "models": set(),
    "data": set(),
}
# And single modules: for a reason that holds for them alone.
EXCEPTIONS = {
    ("trainer.__main__", "launcher"),  # checks where the packages come from
    ("trainer.__main__", "models"),
    ("trainer.__main__", "data"),
    ("trainer.backends.wrap", "models.layers"),  # tells BatchNorm that a forward is a second one
    ("trainer.engine", "models.layers"),  # and which part of a step it is
    ("trainer.exports.bundle", "models.transnext"),  # writes its settings as code
    ("trainer.exports.bundle", "models.timm_model"),  # whose code another library has
    ("trainer.exports.preprocessing", "models.timm_model"),
    ("trainer.exports.formats", "models.convert"),  # knows the authors' layouts
    ("trainer.exports.__main__", "models.convert"),
    ("trainer.exports.official", "models.convert"),  # writes the authors' files
    ("trainer.exports.source", "models.fold"),  # leaves out what evaluation can do without
    ("trainer.teacher", "models.convert"),  # reads the weights of any model
    ("trainer.evaluation.measure", "models.transnext"),  # has two modes at other sizes
    ("trainer.explain.attention", "models.geometry"),  # computes the weights of attention,
    ("trainer.explain.attention", "models.kernels"),  # which operators keep to themselves
    ("trainer.explain.attention", "models.kernels.eager"),
    ("trainer.explain.attention", "models.transnext"),
    ("trainer.explain.attention", "models.transxnet"),
    ("trainer.finetune.trunk", "models.transxnet"),  # whose maps detectors normalise
    ("trainer.pretrained", "models.convert"),  # and those of a source
    ("trainer.pretrained", "models.fold"),  # and an export without batch norms
}


# Of the trainer, what the launcher imports, and what that imports in turn.
TORCH_FREE = {
    *("trainer.config", "trainer.recipes", "trainer.sections", "trainer.typed_json"),
    *("trainer.manifest", "trainer.shardfile", "trainer.capabilities", "trainer.zero_config"),
    *("trainer.readings", "trainer.nvidia_smi", "trainer.outliers"),
}


def _allowed(importer: str, imported: str) -> bool:
    """Return whether a module of ours may import another one of ours."""
    package = importer.split(".")[0]
    if importer in TORCH_FREE:
        return imported in TORCH_FREE
    if imported.split(".")[0] == package:
        return True
    return imported in ALLOWED[package] or (importer, imported) in EXCEPTIONS


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_only_what_it_may(name):
    path = ROOT / name
    for imported, relative in _imports(path):
        top = imported.split(".")[0]
        if top in PACKAGES:
            assert _allowed(_module(path), imported), f"{name} imports {imported}"
            # An export copies models/ into a bundle, where it has another name.
            assert relative or not (name.startswith("models/") and top == "models"), name
        if top in OWNERS or imported.startswith("torch.utils.tensorboard"):
            owners = OWNERS[top if top in OWNERS else "tensorboard"]
            assert name.startswith(owners), f"{name} imports {imported}; only {owners} may"
        if (name, top) in (("models/convert.py", "safetensors"), ("models/timm_model.py", "timm")):
            continue  # reads checkpoint files, stands for timm's networks: none of ours needs it
        if name.startswith("models/") and top not in ("torch", "triton", "models"):
            assert top in sys.stdlib_module_names, f"{name} imports {imported}: models know torch"
        if top == "torch" and name != "trainer/plan.py":
            assert not _is_private(imported), f"{name} imports the private {imported}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "trainer/plan.py"])
def test_private_torch_modules_are_left_alone(name):
    tree = ast.parse((ROOT / name).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            module = ast.unparse(node.value)  # of a private function, torch._f, this is torch
            dotted = re.fullmatch(r"torch(\.\w+)+", module)
            assert not (dotted and _is_private(module)), f"{name} uses {module}"


def test_a_login_node_needs_no_torch():
    modules = [
        "trainer.config",
        "trainer.recipes",
        *(module for module in sorted(MODULES) if module.split(".")[0] == "launcher"),
    ]
    script = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "models", "data"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_small(name):
    text = (ROOT / name).read_text()
    assert text.count("\n") <= 400, f"{name} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 80, f"{name}: {node.name} has {lines} lines"


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("__init__.py")])
def test_package_files_are_empty(name):
    if name == "models/kernels/__init__.py":
        return
    lines = (ROOT / name).read_text().splitlines()
    # models and data may show their face in one line.
    faces = ("models/__init__.py", "data/__init__.py")
    statements = [node for node in ast.parse("\n".join(lines)).body if not _is_docstring(node)]
    assert len(statements) <= 1 if name in faces else not lines, name


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_nothing_has_a_name_that_means_nothing():
    meaningless = {"utils", "util", "common", "helpers", "helper", "misc"}
    for path in _tracked():
        for part in (*path.parts[:-1], path.stem):
            assert part.lower() not in meaningless, path


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed():
    listed = _setup()["options"]["packages"].split()
    found = {".".join(path.relative_to(ROOT).parts[:-1]) for path in FILES}
    assert sorted(listed) == sorted(found)


def _requirements() -> dict[str, str]:
    """Return every requirement of setup.cfg, extras included: name -> the whole line."""
    setup = _setup()
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line for text in texts for line in text.split("\n") if line and line[0] != "#"]
    return {re.split(r"[<>=]", line)[0]: line for line in lines}


def test_every_dependency_has_a_range_a_reason_and_a_version():
    text = (ROOT / "setup.cfg").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    for name, line in _requirements().items():
        known = r'[a-z0-9-]+>=[0-9.]+,<[0-9.]+(; platform_system == "Linux")?'
        assert re.fullmatch(known, line), line
        assert re.search(rf"\n    # [^\n]+\n    {re.escape(line)}\n", text), f"no reason for {name}"
        if name != "ffcv":  # it builds only where OpenCV's headers are, and `make setup` needs none
            assert re.search(rf"^{re.escape(name)}==", pins, re.MULTILINE), f"no version of {name}"


def test_every_import_is_a_declared_dependency():
    known = metadata.packages_distributions()
    required = {name.lower() for name in _requirements()}
    for name, path in zip(NAMES, FILES, strict=True):
        for imported, _ in _imports(path):
            top = imported.split(".")[0]
            if top in PACKAGES or top in sys.stdlib_module_names or top in BUNDLE:
                continue
            owners = {owner.lower() for owner in known.get(top, [top])}
            assert owners & required, f"{name} imports {top}, which setup.cfg does not name"


def _tracked() -> list[Path]:
    """Return the project's files, as paths relative to its root."""
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout:
            return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).is_file()]
    except OSError:
        pass  # a copy of the project without git: what is in its folders is the project
    folders = (*PACKAGES, "tests", "docs", "benchmarks", "slurm")
    return [
        path.relative_to(ROOT)
        for pattern in ("*", *(f"{folder}/**/*" for folder in folders))
        for path in ROOT.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    ]


def test_no_file_names_a_place_on_somebodys_machine():
    places = re.compile(r"(?<![\w.])/(?:work|root|home|opt|Users|mnt|scratch)/\w")
    for path in _tracked():
        if path.suffix in (".npz", ".png", ".safetensors", ".pt", ".jpg", ".jpeg"):
            continue
        found = places.search((ROOT / path).read_text(errors="replace"))
        assert not found, f"{path}: {found.group() if found else ''}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["ruff check .", "ruff format --check .", "mypy"], ids=lambda text: text
)
def test_lint(command):
    program, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
