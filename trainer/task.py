"""Tasks: what a model is trained for. Nothing else in the trainer knows about labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import RunConfig
from .sections import DistillConfig
from .teacher import load_teacher


@dataclass(frozen=True)
class Loss:
    """`total` is what the backward pass starts from; `parts` are scalars worth reporting."""

    total: Tensor
    parts: dict[str, Tensor]


Task = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Loss]
"""From a model, images, targets and drop-path noise to a loss; see `classification`."""


def make_task(config: RunConfig, device: torch.device) -> Task:
    """Return the task of a run, with its teacher on `device` if it has one.

    Raises:
        UserError, ModelError: as `load_teacher` does.
    """
    z_loss = config.train.z_loss
    if config.distill.teacher is None:
        return partial(classification, z_loss=z_loss)
    teacher = load_teacher(config, device)
    return partial(distillation, z_loss=z_loss, teacher=teacher, config=config.distill)


def classification(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    drop_noise: Tensor | None,
    *,
    z_loss: float,
) -> Loss:
    """Return the cross-entropy of soft targets, a mean over the micro-batch.

    `z_loss` times the mean square of the log-partition function is added to the total (PaLM,
    https://arxiv.org/abs/2204.02311, with 1e-4): it keeps the logits from drifting.

    Shapes: images float32 [B, 3, H, W], targets float32 [B, num_classes] with rows that sum to 1,
    drop_noise float32 [num_blocks, 2, B] or None. The loss is computed in fp32.
    """
    logits = model(images, drop_noise).float()
    loss, penalty = _cross_entropy(logits, targets, z_loss=z_loss)
    return Loss(loss if penalty is None else loss + penalty, {"loss": loss.detach()})


def distillation(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    drop_noise: Tensor | None,
    *,
    z_loss: float,
    teacher: Callable[[Tensor], Tensor],
    config: DistillConfig,
) -> Loss:
    """Return `classification`'s loss, of which a share `config.weight` is the teacher's instead.

    A soft teacher's is the divergence of the tempered predictions times the temperature's square
    (https://arxiv.org/abs/1503.02531), a hard one's the cross-entropy of its first choice (DeiT,
    https://arxiv.org/abs/2012.12877). It sees the same images: mixed ones too.
    """
    advice = teacher(images).float()  # first: nothing is saved for the backward pass yet
    logits = model(images, drop_noise).float()
    loss, penalty = _cross_entropy(logits, targets, z_loss=z_loss)
    lesson = _lesson(logits, advice, config)
    total = (1 - config.weight) * loss + config.weight * lesson
    parts = {"loss": loss.detach(), "distill_loss": lesson.detach()}
    return Loss(total if penalty is None else total + penalty, parts)


def _cross_entropy(
    logits: Tensor, targets: Tensor, *, z_loss: float
) -> tuple[Tensor, Tensor | None]:
    """The cross-entropy and the penalty on the log-partition function, if there is one."""
    log_partition = logits.logsumexp(dim=1, keepdim=True)
    loss = (targets * (log_partition - logits)).sum(dim=1).mean()
    return loss, z_loss * log_partition.square().mean() if z_loss else None


def _lesson(logits: Tensor, advice: Tensor, config: DistillConfig) -> Tensor:
    if config.kind == "hard":
        return F.cross_entropy(logits, advice.argmax(dim=1))
    student, teacher = (
        F.log_softmax(values / config.temperature, dim=1) for values in (logits, advice)
    )
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * config.temperature**2
