"""Weights to start from, wherever they come from, as a network that knows how it was trained.

A source is a run folder, one of its checkpoints, a bundle that `foveate export` wrote, a weight
file of the authors, or a model's name, which is that model untrained. Invariant: nothing of it is
unpickled, and no code in it is run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base import Backbone, ModelError
from models.convert import identify, load_weights, read_weights
from models.fold import fold_batch_norm
from models.registry import MODELS, build

from . import manifest
from .checkpoint import check_model, read_state
from .config import RunConfig, UserError
from .sections import DataConfig, EvalConfig, ModelConfig
from .typed_json import typed

Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A network in evaluation mode and what a later use of it has to know.

    `mean` and `std` are the colours of the images that it was trained on, in 0..1; `crop_pct` is
    the share of the shorter side that it was evaluated on. `checkpoint` is the folder that the
    `weights` (ema or live) came from, None where they came from elsewhere. A `folded` network's
    batch norms are in its convolutions: it is for evaluation alone. One that is not `trained` has
    the weights that its name is initialised with.
    """

    source: str
    config: ModelConfig
    model: Backbone
    mean: Colour = DataConfig.mean
    std: Colour = DataConfig.std
    crop_pct: float = EvalConfig.crop_pct
    checkpoint: Path | None = None
    weights: str | None = None
    folded: bool = False
    trained: bool = True

    @property
    def published_drop_path(self) -> float:
        """The stochastic depth rate of the model's classification recipe; timm's have none."""
        return MODELS[self.config.name].drop_path if self.config.name in MODELS else 0.0

    def backbone(
        self,
        *,
        img_size: int,
        num_classes: int,
        drop_path: float = 0.0,
        position_mode: str | None = None,
    ) -> Backbone:
        """Return a new network with these weights to train on, for images of another size.

        Another number of classes gets a fresh head; 0 leaves it out. Position biases go on from
        the size that they were trained at, as `models.transnext.TransNeXt` explains.

        Raises:
            UserError: if the batch norms are folded.
            ModelError: if the model cannot be built like this.
        """
        if self.folded:
            raise UserError(
                f"{self.source} is exported with folded batch norms, for evaluation alone: export "
                "its run again without --fold-batch-norm"
            )
        options = asdict(replace(self.config, img_size=img_size, drop_path=drop_path))
        if not self.config.name.startswith("timm:"):
            options["pretrain_size"] = self.config.pretrain_size or self._trained_at()
        if position_mode is not None:
            options["position_mode"] = position_mode
        model = build(**options)
        if self.model.num_classes == 0:
            model.reset_classifier(0)
        model.load_state_dict(self.model.state_dict())
        if num_classes != self.model.num_classes:
            model.reset_classifier(num_classes)
        return model

    def _trained_at(self) -> int | None:
        """The size that position biases are trained at, where the model's name does not say it."""
        return self.config.img_size if self.config.name.startswith("transnext") else None


def pretrained(source: str | Path, *, weights: str | None = None) -> Pretrained:
    """Return the network at `source`; of a run, with its `weights` ema or live.

    By default a run's average is taken where it kept one.

    Raises:
        UserError: if there is nothing of the kind, it is damaged, or lacks the weights asked for.
        ModelError: if the weights do not fit the model.
    """
    name, path = str(source), Path(source)
    if path.is_dir():
        own = _bundled(path)
        if own is None:
            return from_run(path, weights=weights)
        _no_choice(weights, f"{name} is an exported bundle")
        return _from_bundle(path, own)
    if path.exists():
        _no_choice(weights, f"{name} is a file of weights")
        return _from_file(path)
    _no_choice(weights, f"{name} is no run")
    if name not in MODELS and not name.startswith("timm:"):
        raise UserError(
            f"{name} does not exist: give a run folder, a checkpoint, a bundle that foveate export "
            f"wrote, a file of weights, or a model's name (known: {', '.join(MODELS)})"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same on each process and at each start
        model = build(name, drop_path=0.0).eval()
    return Pretrained(source=name, config=ModelConfig(name=name), model=model, trained=False)


def from_run(source: Path, *, weights: str | None = None) -> Pretrained:
    """Return the network of a run's newest good checkpoint, or of the checkpoint folder `source`.

    Raises:
        UserError: if there is no whole checkpoint there, or it lacks the weights asked for.
    """
    checkpoint = manifest.whole_checkpoint(source.resolve())
    config = run_config(checkpoint)
    if weights is None:
        weights = "ema" if config.train.ema_decay > 0 else "live"
    if weights == "ema" and config.train.ema_decay == 0:
        raise UserError(f"{source} has no averaged weights: use --weights live")
    check_model(checkpoint, config.model.name)
    trained = replace(config.model, drop_path=0.0)
    model = build(**asdict(trained)).eval()
    buffers = {name for name, _ in model.named_buffers()}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        averaged = weights == "ema" and tensor.is_floating_point()
        kind = "ema" if averaged else "buffer" if name in buffers else "weight"
        state[f"{kind}/{name}"] = tensor
    read_state(checkpoint, state)
    return Pretrained(
        source=str(source),
        config=trained,
        model=model,
        mean=config.data.mean,
        std=config.data.std,
        crop_pct=config.eval.crop_pct,
        checkpoint=checkpoint,
        weights=weights,
    )


def begin_from(source: str, model: Backbone) -> None:
    """Fill `model` in place with the weights at `source`; its head, too, if classes are as many.

    Raises:
        UserError: as `pretrained` does, and if the weights are of another model.
        ModelError: as `pretrained` does.
    """
    found = pretrained(source)
    if not found.trained or found.folded:
        what = "has folded batch norms" if found.folded else "has learnt nothing"
        raise UserError(f"train.init_from {source} {what}: give trained weights, not folded")
    state = found.model.state_dict()
    expected = dict(model.state_dict())
    if found.model.num_classes != model.num_classes:
        head = f"{model.blocks()[-1].name}."
        fresh = {k: v for k, v in expected.items() if k.startswith(head)}
        same = {k for k, v in fresh.items() if k in state and state[k].shape == v.shape}
        state |= {k: v for k, v in fresh.items() if k not in same}
    differing = sorted(
        {name for name, value in state.items() if name not in expected}
        | {k for k, v in expected.items() if k not in state or state[k].shape != v.shape}
    )
    if differing:
        raise UserError(
            f"train.init_from {source} is of another model than this {type(model).__name__}: "
            f"{differing[0]} and {len(differing) - 1} more weights differ; take the settings of "
            "its section model"
        )
    model.load_state_dict(state)


def run_config(checkpoint: Path) -> RunConfig:
    """Return the configuration of the run that a checkpoint folder belongs to.

    Raises:
        UserError: if it cannot be read.
    """
    return RunConfig.read(checkpoint.parent.parent / "config.json")


def _bundled(folder: Path) -> dict[str, Any] | None:
    """Return config.json of an exported bundle, or None if the folder is none."""
    try:
        description = json.loads((folder / "config.json").read_text())
        return description if "foveate" in description else None
    except (OSError, ValueError, TypeError):
        return None


def _from_bundle(folder: Path, description: dict[str, Any]) -> Pretrained:
    try:
        own, cfg = description["foveate"], description["pretrained_cfg"]
        config = replace(typed(ModelConfig, own["model"]), drop_path=0.0)
        model = build(**asdict(config))
        folded = bool(own["folded"])
        (r, g, b), (r_std, g_std, b_std) = cfg["mean"], cfg["std"]
        crop_pct = float(cfg["crop_pct"])
    except (ValueError, KeyError, TypeError, ModelError) as error:
        raise UserError(
            f"{folder} is not a bundle of this version of Foveate ({error!r}): export its run again"
        ) from None
    model = fold_batch_norm(model) if folded else model
    load_weights(model, folder / "model.safetensors")
    return Pretrained(
        source=str(folder),
        config=config,
        model=model.eval(),
        mean=(r, g, b),
        std=(r_std, g_std, b_std),
        crop_pct=crop_pct,
        folded=folded,
    )


def _from_file(path: Path) -> Pretrained:
    """Return the published model that a file of weights fits."""
    found = identify(read_weights(path))
    if found is None:
        raise UserError(
            f"{path} fits none of the models ({', '.join(MODELS)}): give the run or the bundle "
            "that the weights come from"
        )
    name, options = found
    model = build(name, drop_path=0.0, **options).eval()
    load_weights(model, path)
    config = ModelConfig(name=name, **options)
    return Pretrained(source=str(path), config=config, model=model)


def _no_choice(weights: str | None, why: str) -> None:
    if weights is not None:
        raise UserError(f"--weights {weights} chooses among a run's weights, and {why}")
