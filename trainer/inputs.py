"""What a run's configuration makes of its data: the training stream, its mixing, the evaluation."""

from __future__ import annotations

from itertools import zip_longest

import torch

from data.augment import AugmentSpec
from data.base import DataPipeline, Source
from data.color import ColorSpec
from data.mixing import Mixer, MixSpec
from data.order import FullShuffle, Shuffle, stream_shuffle
from data.pipeline import ImagePipeline, open_source
from data.policy import keeps_color_jitter

from .config import RunConfig, UserError
from .sections import DataConfig


def make_stream(config: RunConfig, device: torch.device) -> DataPipeline:
    """Open the training split, for our own loader or FFCV's.

    Raises:
        UserError, DataError: as `make_pipeline` does.
    """
    data = config.data
    if data.source != "ffcv_native":
        return make_pipeline(config, device)
    from data.ffcv import NativeLoader  # which imports a package that few have

    loader = NativeLoader(
        data.train,
        size=config.model.img_size,
        global_batch=config.train.batch_size,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        hflip=data.hflip,
        seed=config.train.seed,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        device=device,
    )
    _check_classes(config, loader.source)
    return loader


def make_pipeline(config: RunConfig, device: torch.device) -> ImagePipeline:
    """Open the training split.

    Raises:
        UserError: if its classes are not those of the model.
        DataError: if it cannot be opened or is smaller than a batch.
    """
    data = config.data
    source = _open(data, data.train)
    _check_classes(config, source)
    augment = AugmentSpec(
        size=config.model.img_size,
        sizes=config.train.image_sides(),
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        interpolation=data.interpolation,
        dct_scaling=data.dct_scaling,
        hflip=data.hflip,
        auto_augment=data.auto_augment,
        mean=data.mean,
    )
    return ImagePipeline(
        source,
        augment=augment,
        shuffle=_shuffle(config, source),
        max_replaced=int(data.max_bad * len(source)),
        global_batch=config.train.batch_size,
        micro_batches=config.train.accumulate,
        mix_group=data.mix_group,
        repeats=data.repeats,
        seed=config.train.seed,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        device=device,
    )


def _open(data: DataConfig, path: str) -> Source:
    cache_bytes = None if data.cache_gb is None else int(1e9 * data.cache_gb)
    return open_source(data.source, path, cache_dir=data.cache_dir, cache_bytes=cache_bytes)


def _check_classes(config: RunConfig, source: Source) -> None:
    if len(source.classes) != config.model.num_classes:
        raise UserError(
            f"{config.data.train} has {len(source.classes)} classes but model.num_classes is "
            f"{config.model.num_classes}: set --model.num-classes {len(source.classes)}"
        )


def _shuffle(config: RunConfig, source: Source) -> Shuffle:
    data, seed = config.data, config.train.seed
    if data.order == "full":
        return FullShuffle(num_samples=len(source), seed=seed)
    return stream_shuffle(
        source,
        seed=seed,
        lanes=data.lanes,
        window=data.window,
        allow_unmixed=data.allow_unmixed,
    )


def open_val(config: RunConfig, *, classes: tuple[str, ...]) -> Source:
    """Open the evaluation split, whose labels must mean the same `classes` as the training's.

    Raises:
        UserError: if they do not.
        DataError: if it cannot be opened.
    """
    data = config.data
    val = _open(data, data.val)
    if val.classes != classes:
        pairs = zip_longest(classes, val.classes, fillvalue="missing")
        label, (ours, its) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"{data.val} has other classes than {data.train}: class {label} is {its}, not {ours}; "
            "both must have the same, in the same order"
        )
    return val


def make_mixer(config: RunConfig) -> Mixer:
    """Return what turns a batch of pixels into network inputs and soft targets."""
    data = config.data
    spec = MixSpec(
        num_classes=config.model.num_classes,
        mixup=data.mixup,
        cutmix=data.cutmix,
        switch_prob=data.mix_switch_prob,
        label_smoothing=config.train.label_smoothing,
        erase_prob=data.erase_prob,
        color=_color(data),
        mean=data.mean,
        std=data.std,
    )
    return Mixer(spec, seed=config.train.seed)


def _color(data: DataConfig) -> ColorSpec:
    """Return what happens to colours on the device; most policies leave no jitter beside them."""
    strength, hue = data.color_jitter, data.hue_jitter
    if not keeps_color_jitter(data.auto_augment):
        strength = hue = 0.0
    return ColorSpec(
        color_jitter=(strength, strength, strength, hue),
        color_jitter_prob=data.color_jitter_prob,
        grayscale_prob=data.grayscale_prob,
        gaussian_blur_prob=data.gaussian_blur_prob,
        solarize_prob=data.solarize_prob,
    )


def pixels(images: torch.Tensor, config: RunConfig) -> torch.Tensor:
    """Return network inputs float32 [B, 3, H, W] as pixels to look at, uint8 [B, H, W, 3]."""
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    shown = images.permute(0, 2, 3, 1).float().cpu()
    return ((shown * std + mean) * 255).round().clamp(0, 255).byte()
