"""Recipes: functions that return a RunConfig.

The published ones follow the official repositories of TransNeXt (https://arxiv.org/abs/2311.17132)
and TransXNet (https://arxiv.org/abs/2310.19380). Two things differ on purpose: the schedule moves
with every step instead of every epoch, and the compute type is bfloat16, which needs no loss scale,
where both papers used float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from .config import RunConfig, UserError, nearest
from .sections import (
    BackendConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from .typed_json import typed


def _transnext(size: str, *, drop_path: float, img_size: int = 224) -> RunConfig:
    """Return the ImageNet-1k recipe that all TransNeXt sizes share."""
    name = f"transnext_{size}"
    return RunConfig(
        recipe=name,
        run_dir=f"runs/{name}",
        model=ModelConfig(name=name, img_size=img_size, drop_path=drop_path),
        data=_imagenet(repeats=3),
        train=TrainConfig(epochs=300, batch_size=1024),
        optim=OptimConfig(lr=1e-3, clip_grad=1.0),
        eval=EvalConfig(crop_pct=0.875),
    )


def _transxnet(size: str, *, drop_path: float, ema_decay: float, crop_pct: float) -> RunConfig:
    """Return the ImageNet-1k recipe that all TransXNet sizes share."""
    name = f"transxnet_{size}"
    return RunConfig(
        recipe=name,
        run_dir=f"runs/{name}",
        model=ModelConfig(name=name, drop_path=drop_path),
        data=_imagenet(interpolation="random"),
        train=TrainConfig(epochs=310, batch_size=1024, ema_decay=ema_decay, seed=42),
        optim=OptimConfig(lr=2e-3, cooldown_epochs=10),
        eval=EvalConfig(crop_pct=crop_pct),
    )


def _imagenet(
    *, repeats: int = 1, interpolation: Literal["bicubic", "random"] = "bicubic"
) -> DataConfig:
    # Both papers also name colour jitter 0.4, which timm, their data loader, drops wherever a
    # RandAugment policy is given: it was never applied, so it is left at 0 here.
    return DataConfig(
        auto_augment="rand-m9-mstd0.5-inc1",
        mixup=0.8,
        cutmix=1.0,
        erase_prob=0.25,
        repeats=repeats,
        interpolation=interpolation,
    )


def _stabilised(config: RunConfig) -> RunConfig:
    """Return what half a billion parameters and more want on top of the published recipe.

    TransXNet has a layer scale of its own.
    """
    layer_scale = 1e-5 if config.model.name.startswith("transnext") else None
    return replace(
        config,
        model=replace(config.model, layer_scale=layer_scale),
        train=replace(config.train, z_loss=1e-4),
        backend=BackendConfig(name="fsdp"),
        memory=MemoryConfig(checkpointing="full"),
    )


def transnext_micro() -> RunConfig:
    """TransNeXt-Micro, 300 epochs of ImageNet-1k at 224 pixels."""
    return _transnext("micro", drop_path=0.15)


def transnext_tiny() -> RunConfig:
    """TransNeXt-Tiny, 300 epochs of ImageNet-1k at 224 pixels."""
    return _transnext("tiny", drop_path=0.25)


def transnext_small() -> RunConfig:
    """TransNeXt-Small, 300 epochs of ImageNet-1k at 224 pixels."""
    return _transnext("small", drop_path=0.45)


def transnext_base() -> RunConfig:
    """TransNeXt-Base, 300 epochs of ImageNet-1k at 224 pixels."""
    return _transnext("base", drop_path=0.6)


def transnext_micro_AAAA() -> RunConfig:
    """TransNeXt-Micro with aggregated attention in all stages, at 256 pixels."""
    return _transnext("micro_AAAA", drop_path=0.15, img_size=256)


def transnext_large() -> RunConfig:
    """TransNeXt-Large, 200 M parameters: the published recipe, beyond the published sizes."""
    return _transnext("large", drop_path=0.6)


def transnext_huge() -> RunConfig:
    """TransNeXt-Huge, 0.5 G parameters: the published recipe, with layer scale and z-loss."""
    return _stabilised(_transnext("huge", drop_path=0.6))


def transnext_giant() -> RunConfig:
    """TransNeXt-Giant, 2.1 G parameters: the published recipe, with layer scale and z-loss."""
    return _stabilised(_transnext("giant", drop_path=0.6))


def transxnet_t() -> RunConfig:
    """TransXNet-T, 300 epochs of ImageNet-1k at 224 pixels and 10 of cool-down."""
    return _transxnet("t", drop_path=0.1, ema_decay=0.9998, crop_pct=0.9)


def transxnet_s() -> RunConfig:
    """TransXNet-S, 300 epochs of ImageNet-1k at 224 pixels and 10 of cool-down."""
    return _transxnet("s", drop_path=0.2, ema_decay=0.99985, crop_pct=0.9)


def transxnet_b() -> RunConfig:
    """TransXNet-B, 300 epochs of ImageNet-1k at 224 pixels and 10 of cool-down."""
    return _transxnet("b", drop_path=0.4, ema_decay=0.99985, crop_pct=0.95)


def transxnet_large() -> RunConfig:
    """TransXNet-Large, 117 M parameters: the published recipe, beyond the published sizes."""
    return _transxnet("large", drop_path=0.5, ema_decay=0.99985, crop_pct=0.95)


def transxnet_huge() -> RunConfig:
    """TransXNet-Huge, 0.5 G parameters: the published recipe, with z-loss."""
    return _stabilised(_transxnet("huge", drop_path=0.6, ema_decay=0.99985, crop_pct=0.95))


def demo() -> RunConfig:
    """TransNeXt-Pico on CIFAR-10: minutes on two CPU cores."""
    return RunConfig(
        recipe="demo",
        run_dir="runs/demo",
        model=ModelConfig(name="transnext_pico", img_size=32, num_classes=10),
        data=DataConfig(
            train="datasets/cifar10/train",
            val="datasets/cifar10/val",
            num_workers=1,
            crop_scale=(0.85, 1.0),
            interpolation="bilinear",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
        train=TrainConfig(
            epochs=2, batch_size=128, precision="fp32", label_smoothing=0.1, ema_decay=0.99
        ),
        optim=OptimConfig(lr=3e-3, warmup_epochs=0.2, clip_grad=1.0),
        backend=BackendConfig(name="fsdp"),
        eval=EvalConfig(batch_size=500, crop_pct=1.0),
        checkpoint=CheckpointConfig(every=100, keep_last=2),
        log=LogConfig(every=10),
    )


def classify(source: str) -> RunConfig:
    """Return TransNeXt's recipe at 384 pixels, 5 epochs on ImageNet-1k, from the weights `source`.

    `source` is a run folder, one of its checkpoints, a bundle that foveate export wrote, or a
    weight file named after its model. The rate is constant and there is no cutmix; sizes that were
    not published keep their drop path. TransXNet's recipe at 384 was never published: it gets the
    same.

    Raises:
        UserError: if there is nothing of the kind.
    """
    model, data = _described(Path(source))
    size = model.name.removeprefix("transnext_")
    usual = RECIPES[model.name]().model.drop_path if model.name in RECIPES else model.drop_path
    on_transnext = model.name.startswith("transnext")
    return RunConfig(
        recipe="classify",
        run_dir=f"runs/{model.name.replace(':', '_')}_384",
        model=replace(
            model,
            img_size=384,
            pretrain_size=model.pretrain_size or (model.img_size if on_transnext else None),
            drop_path={"small": 0.7, "base": 0.8}.get(size, usual) if on_transnext else usual,
        ),
        data=replace(_imagenet(repeats=3), cutmix=0.0, mean=data.mean, std=data.std),
        train=TrainConfig(epochs=5, batch_size=1024, init_from=source),
        optim=OptimConfig(lr=1e-5, min_lr=1e-5, warmup_epochs=0, clip_grad=1.0),
    )


def _described(source: Path) -> tuple[ModelConfig, DataConfig]:
    """Say what network the weights at `source` are of, and the colours that it is used to."""
    for folder in (source, source.parent.parent):  # a run, and the run of one of its checkpoints
        if (folder / "checkpoints").is_dir():
            run = RunConfig.read(folder / "config.json")
            return run.model, run.data
    if source.is_dir():
        try:
            content = json.loads((source / "config.json").read_text())
            (r, g, b), (r_std, g_std, b_std) = (
                content["pretrained_cfg"][k] for k in ("mean", "std")
            )
            colours = DataConfig(mean=(r, g, b), std=(r_std, g_std, b_std))
            return typed(ModelConfig, content["foveate"]["model"]), colours
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{source} is neither a run, nor a checkpoint, nor a bundle that foveate export "
                f"wrote ({error!r})"
            ) from None
    if not source.exists():
        raise UserError(f"{source} does not exist: give a run, a bundle or a file of weights")
    names = [name for name in RECIPES if name in source.name.lower()]
    if not names:
        raise UserError(
            f"{source} does not say which model it is of: name it after its model, such as "
            f"transnext_base.pth (known: {', '.join(RECIPES)})"
        )
    return ModelConfig(name=max(names, key=len)), DataConfig()


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        transnext_micro,
        transnext_tiny,
        transnext_small,
        transnext_base,
        transnext_micro_AAAA,
        transnext_large,
        transnext_huge,
        transnext_giant,
        transxnet_t,
        transxnet_s,
        transxnet_b,
        transxnet_large,
        transxnet_huge,
        demo,
    )
}


def recipe(name: str) -> RunConfig:
    """Return the recipe called `name`; `classify:SOURCE` fine-tunes what is at SOURCE.

    Raises:
        UserError: if there is none, with the nearest name.
    """
    if name.startswith("classify:"):
        return classify(name.removeprefix("classify:"))
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise UserError(f"unknown recipe {name}{nearest(name, list(RECIPES))} (known: {known})")
    return RECIPES[name]()
