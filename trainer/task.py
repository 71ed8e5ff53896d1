"""Tasks: what a model is trained for. Nothing else in the trainer knows about labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """`total` is what the backward pass starts from; `parts` are scalars worth reporting."""

    total: Tensor
    parts: dict[str, Tensor]


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
    log_partition = logits.logsumexp(dim=1, keepdim=True)
    loss = (targets * (log_partition - logits)).sum(dim=1).mean()
    total = loss + z_loss * log_partition.square().mean() if z_loss else loss
    return Loss(total, {"loss": loss.detach()})
