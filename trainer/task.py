"""Tasks: what a model is trained for. Nothing else in the trainer knows about labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import log_softmax


@dataclass(frozen=True)
class Loss:
    """`total` is what the backward pass starts from; `parts` are scalars worth reporting."""

    total: Tensor
    parts: dict[str, Tensor]


def classification(
    model: nn.Module, images: Tensor, targets: Tensor, drop_noise: Tensor | None
) -> Loss:
    """Return the cross-entropy of soft targets, a mean over the micro-batch.

    Shapes: images float32 [B, 3, H, W], targets float32 [B, num_classes] with rows that sum to 1,
    drop_noise float32 [num_blocks, 2, B] or None. The logarithm is taken in fp32.
    """
    logits = model(images, drop_noise)
    total = -(targets * log_softmax(logits.float(), dim=1)).sum(dim=1).mean()
    return Loss(total, {"loss": total.detach()})
