"""Evaluating one network on test sets, at several image sizes, on all processes of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch.distributed as dist
from torch import nn

from data.augment import EvalSpec
from data.base import Batch, Shard, Source
from data.mixing import normalize
from data.pipeline import eval_batches
from data.progress import Say, counting
from models.base import Backbone
from models.transnext import PositionMode, TransNeXt

from ..evaluate import evaluate, hits_label
from ..precision import autocast
from ..pretrained import Pretrained
from .scores import Among, AnyOf, CorruptionError, corruption_errors, mean
from .sets import TestSet


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An image side, and what becomes of TransNeXt's position biases if it is a new one."""

    side: int
    positions: PositionMode | None = None

    def __str__(self) -> str:
        return f"{self.side}" if self.positions is None else f"{self.side} {self.positions}d"

    def apply(self, model: Backbone) -> None:
        """Set a model for images of this side.

        Raises:
            ModelError: if it cannot be.
        """
        if isinstance(model, TransNeXt):
            model.position_mode = self.positions
        model.reset_buffers((self.side, self.side))


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a setting reached on a test set of so many `images`, in percent.

    Of ImageNet-C, `top1` and `top5` are means over its parts, and `corruptions` and their mean
    `mce` come besides.
    """

    data: str
    setting: Setting
    images: int
    top1: float
    top5: float
    mce: float | None = None
    corruptions: dict[str, CorruptionError] | None = None


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How each process goes about it: images at a time, decoding threads, compute type."""

    batch_size: int
    num_workers: int
    precision: str


def settings_for(model: Backbone, sides: Sequence[int]) -> list[Setting]:
    """Return the settings that image sides mean: of TransNeXt's new sizes, both position modes."""
    settings = []
    for side in sides:
        modes: tuple[PositionMode | None, ...] = (None,)
        if isinstance(model, TransNeXt) and (side, side) != model.img_size:
            modes = get_args(PositionMode)
        settings += [Setting(side=side, positions=mode) for mode in modes]
    return settings


def measure(
    source: Pretrained, test_set: TestSet, setting: Setting, loading: Loading, *, say: Say
) -> Score:
    """Evaluate a network that is on this process's device; the score is the same on every rank.

    Raises:
        DataError: if an image cannot be read.
    """
    setting.apply(source.model)
    images, found = 0, dict[str, dict[str, float]]()
    # The parts of ImageNet-C are equally large.
    total = len(test_set.parts) * len(test_set.parts[0].open())
    with _progress(total, f"{test_set.name} at {setting}", say) as done:
        for part in test_set.parts:
            samples = part.open()
            images += len(samples)
            found[part.name] = _accuracy(source, test_set, samples, setting, loading, done)
    top1, top5 = ({name: part[key] for name, part in found.items()} for key in ("top1", "top5"))
    score = Score(
        data=test_set.name,
        setting=setting,
        images=images,
        top1=mean([*top1.values()]),
        top5=mean([*top5.values()]),
    )
    if not test_set.corrupted:
        return score
    errors = corruption_errors(top1)
    return replace(
        score, mce=mean([error.relative for error in errors.values()]), corruptions=errors
    )


def _accuracy(
    source: Pretrained,
    test_set: TestSet,
    samples: Source,
    setting: Setting,
    loading: Loading,
    done: Callable[[int], None],
) -> dict[str, float]:
    """Return top1 and top5 in percent on the samples of a part."""
    model: nn.Module = source.model
    device = source.model.device
    if test_set.among is not None:
        model = Among(model, test_set.among)
    batches = eval_batches(
        samples,
        spec_for(source, test_set, setting),
        batch_size=loading.batch_size,
        shard=Shard(rank=dist.get_rank(), world_size=dist.get_world_size()),
        num_workers=loading.num_workers,
        device=device,
    )
    with closing(batches), autocast(device, loading.precision):
        accuracy = evaluate(
            model,
            _counted(batches, done),
            normalize=partial(normalize, mean=source.mean, std=source.std),
            stop=lambda: False,
            hits=hits_label if test_set.answers is None else AnyOf(test_set.answers),
        )
    assert accuracy is not None, "nothing stops it"
    return accuracy


def spec_for(source: Pretrained, test_set: TestSet, setting: Setting) -> EvalSpec:
    """Return how images are resized and cropped: as the model's authors evaluated it.

    The images of ImageNet-C are centre crops of 224 pixels already, which are taken whole.
    """
    return EvalSpec(
        size=setting.side,
        crop_pct=1.0 if test_set.corrupted else source.crop_pct,
        squash=replace(source.config, img_size=setting.side).squash,
    )


def _counted(batches: Iterable[Batch], done: Callable[[int], None]) -> Iterator[Batch]:
    """Yield batches, and tell `done` how many images all ranks have seen with each."""
    for batch in batches:
        yield batch
        done(int((batch.ids >= 0).sum()) * dist.get_world_size())


@contextmanager
def _progress(total: int, title: str, say: Say) -> Iterator[Callable[[int], None]]:
    """Show on rank 0 how far it is; the other ranks keep silent."""
    if dist.get_rank() > 0:
        yield lambda amount: None
        return
    say(title)
    seen = 0
    with counting(total, "image", say) as done:

        def count(amount: int) -> None:
            nonlocal seen
            amount = min(amount, total - seen)  # the last batches of other ranks may be shorter
            seen += amount
            done(amount, f"{title}: {seen} of {total} images")

        yield count
