"""Exports: bundles that load without Foveate, and prove it.

A timm bundle holds safetensors, timm's config.json with the preprocessing, the model's code in one
file made from our own modules, a sample with its logits, and verify.py, which compares them in a
process where Foveate cannot be imported.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from models.base import Backbone, ModelError
from models.convert import Layout, save_official
from models.fold import fold_batch_norm
from models.registry import MODELS, build
from models.timm_model import TimmModel
from models.transnext import TransNeXtConfig

from . import manifest
from .checkpoint import check_model, read_state
from .config import RunConfig, UserError
from .sections import ModelConfig

HOME = Path(__file__).resolve().parent.parent
MODEL_FILE = "foveate_model.py"
IMPORT = """import sys

sys.path.insert(0, DIR)  # this folder
import foveate_model  # registers the architecture
"""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A trained model on its way out: where from, how configured, with which weights."""

    checkpoint: Path
    config: RunConfig
    weights: str
    model: Backbone
    folded: bool = False


def fold(source: Exportable) -> Exportable:
    """Return the model without the batch norms that evaluation can do without.

    Raises:
        UserError: if it has none that can be folded.
    """
    folded = fold_batch_norm(source.model)
    if folded.state_dict().keys() == source.model.state_dict().keys():
        name = source.config.model.name
        raise UserError(f"{name} has no batch norm to fold: leave --fold-batch-norm out")
    return replace(source, model=folded, folded=True)


def load(source: Path, *, weights: str | None = None) -> Exportable:
    """Read a run's newest good checkpoint, or the checkpoint folder `source`, on one process.

    `weights` is ema or live; by default the average is taken where the run kept one.

    Raises:
        UserError: if there is no whole checkpoint there, or it lacks the weights asked for.
    """
    checkpoint = _checkpoint_in(source.resolve())
    config = RunConfig.read(checkpoint.parent.parent / "config.json")
    if weights is None:
        weights = "ema" if config.train.ema_decay > 0 else "live"
    if weights == "ema" and config.train.ema_decay == 0:
        raise UserError(f"{source} has no averaged weights: use --weights live")
    check_model(checkpoint, config.model.name)
    section = {"ema": "ema", "live": "weight"}[weights]
    model = build(**asdict(replace(config.model, drop_path=0.0))).eval()
    buffers = {name for name, _ in model.named_buffers()}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        averaged = weights == "ema" and tensor.is_floating_point()
        kind = section if averaged or name not in buffers else "buffer"
        state[f"{kind}/{name}"] = tensor
    read_state(checkpoint, state)
    return Exportable(checkpoint=checkpoint, config=config, weights=weights, model=model)


def _checkpoint_in(source: Path) -> Path:
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give a run folder or one of its checkpoints")
    return manifest.whole_checkpoint(source)


def export_timm(source: Exportable, out: Path) -> None:
    """Write a verified bundle that timm loads by `create_model("local-dir:…")`.

    It appears under its name only when it is complete and reproduces its own logits.

    Raises:
        UserError: if `out` is in the way or cannot be written, or the bundle does not verify.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: remove it, or give another --out")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_timm(source, part)
        wrong = verify(part)
        if wrong is not None:
            raise UserError(f"{out} is not written: the bundle does not verify: {wrong}")
        part.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export_official(source: Exportable, out: Path, *, layout: Layout) -> None:
    """Write the weights as one file that the authors' own code reads.

    Raises:
        UserError: if `out` is in the way.
        ModelError: if the model has no such layout or the file cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists: remove it, or give another --out")
    part = out.with_name(f"{out.name}.part")
    try:
        save_official(source.model, part, layout=layout)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _write_timm(source: Exportable, out: Path) -> None:
    config, model, cfg = source.config.model, source.model, _timm_cfg(source)
    description = {
        "num_classes": config.num_classes,
        "num_features": model.feature_info[-1]["num_chs"],
        "pretrained_cfg": cfg,
        "foveate": {"model": asdict(config), "folded": source.folded},  # what a teacher is made by
    }
    if isinstance(model, TimmModel):  # timm has the code of its own networks
        network: nn.Module = model.net
        name = config.name.removeprefix("timm:")
        description["model_args"] = model.model_args
    else:
        network, name = model, f"foveate_{config.name}"
        (out / MODEL_FILE).write_text(model_source(config, cfg, folded=source.folded))
    weights = {k: v.contiguous() for k, v in network.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    description = {"architecture": name, **description}
    (out / "config.json").write_text(json.dumps(description, indent=2))
    (out / "verify.py").write_text((HOME / "trainer" / "verify_timm.py").read_text())
    images = sample_images(config.img_size)
    with torch.no_grad():
        logits = model(images)
    save_file({"images": images, "logits": logits}, out / "sample.safetensors")
    (out / "README.md").write_text(_card(source, name))


def _timm_cfg(source: Exportable) -> dict[str, Any]:
    config, model = source.config, source.model
    size = config.model.img_size
    squash = config.model.squash
    if isinstance(model, TimmModel):
        own = {name: model.net.pretrained_cfg[name] for name in ("classifier", "first_conv")}
    else:
        names = [name for name, _ in model.named_parameters()]
        biases = [name for name, p in model.named_parameters() if p.shape[0] == p.numel()]
        own = {
            "classifier": biases[-1].removesuffix(".bias"),
            "first_conv": names[0].removesuffix(".weight"),
        }
    return {
        **own,
        "input_size": [3, size, size],
        "fixed_input_size": isinstance(model, TimmModel) and "img_size" in model.model_args,
        "num_classes": config.model.num_classes,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if squash else config.eval.crop_pct,
        "crop_mode": "squash" if squash else "center",
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "license": "apache-2.0",
    }


def sample_images(size: int) -> Tensor:
    """Return two smooth images float32 [2, 3, size, size] in -1..1, the same everywhere."""
    grid = torch.linspace(0, 2 * torch.pi, size)
    rows, columns = grid[:, None], grid[None, :]
    channels = [torch.sin((c + 1) * rows + c * columns) for c in range(3)]
    first = torch.stack(channels)
    return torch.stack((first, first.transpose(1, 2).flip(0))).contiguous()


def model_source(config: ModelConfig, cfg: dict[str, Any], *, folded: bool) -> str:
    """Return one file of Python that registers the model with timm and needs nothing of ours."""
    family_config = MODELS[config.name]
    family = type(family_config).__name__.removesuffix("Config")
    size = config.pretrain_size
    options: dict[str, Any] = {"pretrain_size": None if size is None else (size, size)}
    if isinstance(family_config, TransNeXtConfig):
        options["pretrain_size"] = (size or config.img_size,) * 2
        options |= {
            "fixed_pool_size": config.fixed_pool_size,
            "position_mode": None,
            "layer_scale": config.layer_scale,
        }
    modules = [f"models.{family.lower()}", "trainer.timm_adapter"]
    build = f"partial(Timm{family}, CONFIG, **OPTIONS)"
    if folded:
        modules.append("models.fold")
        build = f"lambda **own: fold_batch_norm(Timm{family}(CONFIG, **OPTIONS, **own))"
    return "\n\n".join(
        [
            f'"""{family} as trained by Foveate, in one file, for timm. Apache-2.0."""',
            "from __future__ import annotations",
            "from functools import partial",
            *(_own_code(path) for path in _with_dependencies(modules)),
            f"class Timm{family}(TimmBackbone, {family}):\n"
            f'    """{family} under timm\'s names."""\n',
            f"CONFIG = {family_config!r}",
            f"OPTIONS = {options!r}",
            f"CFG = {cfg!r}",
            f"build = {build}",
            f'register_backbone("foveate_{config.name}", build, CFG)\n',
        ]
    )


def _with_dependencies(names: list[str]) -> list[str]:
    """Return our modules that `names` import, each after what it needs."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        for needed in _imports(name):
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
            target = ".".join([*base, *(node.module or "").split(".")])
            if target.startswith("models."):
                yield node, target


def _imports(module: str) -> list[str]:
    return [target for _, target in _own_imports(module)]


def _own_code(module: str) -> str:
    """Return a module's source without its imports of our own modules and of the future."""
    lines = _path(module).read_text().splitlines()
    dropped = [node for node, _ in _own_imports(module)]
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            dropped.append(node)
    for node in dropped:
        for number in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[number] = ""
    return "\n".join(lines).strip()


def _card(source: Exportable, name: str) -> str:
    step = manifest.read(source.checkpoint).step
    code = "" if isinstance(source.model, TimmModel) else IMPORT
    return f"""# {name}

{source.config.model.name}, step {step} of recipe {source.config.recipe}, {source.weights} weights.

```python
import timm
{code}
model = timm.create_model(f"local-dir:{{DIR}}", pretrained=True)
```

`python verify.py` compares the model with the logits in `sample.safetensors`.
"""


def verify(bundle: Path) -> str | None:
    """Run the bundle's verify.py in a fresh process; return what is wrong, or None.

    The process finds what this one finds, a torch by PYTHONPATH for one, but for Foveate: this
    code's folder is taken out, and verify.py blocks its packages wherever else they are.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(path for path in paths if path and Path(path).resolve() != HOME)
    done = subprocess.run(
        [sys.executable, "-P", "-B", str(bundle / "verify.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return said[-1] if said else f"exit code {done.returncode}"
    print(done.stdout.strip())
    return None


def main() -> int:
    """Export a run or a checkpoint and verify the bundle; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="foveate export", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("source", type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument(
        "--format",
        choices=["timm", "official"],
        required=True,
        help="a folder that timm loads, or a file that the authors' code loads",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder or file to write")
    parser.add_argument(
        "--layout", choices=get_args(Layout), default="classification", help="of an official file"
    )
    parser.add_argument("--weights", choices=["ema", "live"], help="default: ema where it exists")
    parser.add_argument(
        "--fold-batch-norm",
        action="store_true",
        help="fold batch norms into the layers beside them: faster, and for evaluation alone",
    )
    arguments = parser.parse_args()
    try:
        source = load(arguments.source, weights=arguments.weights)
        if arguments.fold_batch_norm:
            source = fold(source)
        if arguments.format == "timm":
            export_timm(source, arguments.out)
        else:
            export_official(source, arguments.out, layout=arguments.layout)
    except (UserError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"exported {arguments.source} to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
