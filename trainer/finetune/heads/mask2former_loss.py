"""What Mask2Former's predictions cost (Cheng et al., arXiv:2112.01527, section 3.3).

Each class in an image is a mask to be found. Masks and queries are matched one to one at the least
cost; matched queries are to give the mask and its class, the others to say that there is nothing.
Masks are compared at points, not pixels. Invariant: float32 throughout, and every prediction has a
gradient, if only of zeros, whatever the labels are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .assignment import assign
from .semantic import IGNORED

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0  # of losses and of matching costs alike
NO_OBJECT_WEIGHT = 0.1
OVERSAMPLING = 3  # candidates for each point of the loss
UNCERTAIN_SHARE = 0.75  # of the points: taken where candidates are least certain


@dataclass(frozen=True)
class Prediction:
    """What one layer predicts: `classes` [B, Q, K + 1], the last for nothing; `masks` [B, Q, h, w].

    Both are logits.
    """

    classes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Target:
    """The n classes of an image, int64 [n], and their masks float32 [n, H, W] of zeros and ones."""

    classes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Match:
    """Which queries of an image are to find which of its targets, both int64 [n]."""

    queries: Tensor
    targets: Tensor


def mask2former_losses(
    predictions: list[Prediction], labels: Tensor, *, num_points: int
) -> dict[str, Tensor]:
    """Return the last layer's losses `class`, `mask` and `dice`, and `auxiliary`, of all others.

    There are two layers or more. `labels` are int64 [B, H, W] with 255 where ignored. Losses are
    weighted scalars; those of masks are means over the masks of all processes.
    """
    targets = [_target(image) for image in labels]
    matches = _match(predictions, targets, num_points)
    num_masks = _mean_number(targets)
    *earlier, last = [
        _layer_losses(prediction, targets, match, num_masks, num_points)
        for prediction, match in zip(predictions, matches, strict=True)
    ]
    auxiliary = sum(
        (loss for layer in earlier for loss in layer.values()), torch.zeros_like(num_masks)
    )
    return {**last, "auxiliary": auxiliary} if earlier else last


def _target(labels: Tensor) -> Target:
    """Return what is to be found in an image of labels [H, W]."""
    classes = torch.bincount(labels.flatten())[:IGNORED].nonzero()[:, 0]
    return Target(classes, (labels == classes[:, None, None]).float())


def _mean_number(targets: list[Target]) -> Tensor:
    """Return the number of masks of a process, on average over all of them, and at least 1."""
    device = targets[0].classes.device
    number = torch.tensor(float(sum(len(target.classes) for target in targets)), device=device)
    if dist.is_initialized():
        dist.all_reduce(number)
        number /= dist.get_world_size()
    return number.clamp(min=1)


# Matching.


@torch.no_grad()
def _match(
    predictions: list[Prediction], targets: list[Target], num_points: int
) -> list[list[Match]]:
    """Return the matches of each layer and image; the device is waited for once."""
    costs = [
        _costs(layer.classes[index], layer.masks[index], target, num_points)
        for layer in predictions
        for index, target in enumerate(targets)
    ]
    flat = torch.cat([cost.flatten() for cost in costs]).cpu().double().numpy()
    matches, start = [], 0
    for cost in costs:
        matches.append(_assign(flat[start : start + cost.numel()].reshape(cost.shape), cost.device))
        start += cost.numel()
    return [matches[first : first + len(targets)] for first in range(0, len(matches), len(targets))]


def _costs(classes: Tensor, masks: Tensor, target: Target, num_points: int) -> Tensor:
    """Return the cost [n, Q] of each target for each query, masks compared at random points."""
    points = torch.rand(1, num_points, 2, device=masks.device)
    logits = sample(masks[None], points)[0]
    truth = sample(target.masks[None], points)[0]
    of_class = -classes.softmax(-1)[:, target.classes]
    of_mask, of_dice = pair_costs(logits, truth)
    costs = CLASS_WEIGHT * of_class + MASK_WEIGHT * of_mask + DICE_WEIGHT * of_dice
    limit = torch.finfo(costs.dtype).max  # of predictions that are not finite: taken last
    return costs.nan_to_num(nan=limit, posinf=limit, neginf=limit).T


def pair_costs(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean cross-entropy and dice loss [Q, n] of mask logits [Q, P] and truth [n, P]."""
    # -log p is softplus(-x), -log(1 - p) is softplus(x), and their difference x.
    cross_entropy = (F.softplus(logits).sum(1, keepdim=True) - logits @ truth.T) / logits.shape[1]
    shares = logits.sigmoid()
    common = 2 * shares @ truth.T
    both = shares.sum(1, keepdim=True) + truth.sum(1)
    return cross_entropy, 1 - (common + 1) / (both + 1)


def _assign(costs: NDArray[np.float64], device: torch.device) -> Match:
    """Match targets and queries, given their costs [n, Q]; the shorter side is matched in full."""
    if costs.shape[0] <= costs.shape[1]:
        queries = assign(costs)
        targets = np.arange(len(queries))
    else:
        targets = assign(costs.T)
        queries = np.arange(len(targets))
    return Match(torch.from_numpy(queries).to(device), torch.from_numpy(targets).to(device))


# Losses.


def _layer_losses(
    prediction: Prediction,
    targets: list[Target],
    matches: list[Match],
    num_masks: Tensor,
    num_points: int,
) -> dict[str, Tensor]:
    """Return one layer's weighted losses."""
    pairs = list(zip(targets, matches, strict=True))
    num_classes = prediction.classes.shape[2] - 1
    wanted = torch.full_like(prediction.classes[..., 0], num_classes, dtype=torch.long)
    for index, (target, match) in enumerate(pairs):
        wanted[index, match.queries] = target.classes[match.targets]
    weight = torch.ones(num_classes + 1, device=wanted.device)
    weight[-1] = NO_OBJECT_WEIGHT
    of_class = F.cross_entropy(prediction.classes.flatten(0, 1), wanted.flatten(), weight)

    found = [prediction.masks[index, match.queries] for index, match in enumerate(matches)]
    masks = torch.cat(found)[:, None]
    truth = torch.cat([target.masks[match.targets] for target, match in pairs])[:, None]
    points = uncertain_points(masks, num_points)
    of_mask, of_dice = mask_losses(sample(masks, points)[:, 0], sample(truth, points)[:, 0])
    return {
        "class": CLASS_WEIGHT * of_class,
        "mask": MASK_WEIGHT * of_mask / num_masks,
        "dice": DICE_WEIGHT * of_dice / num_masks,
    }


def mask_losses(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over N masks of cross-entropy and dice loss, of logits and truth [N, P]."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    shares = logits.sigmoid()
    common, both = 2 * (shares * truth).sum(1), (shares + truth).sum(1)
    return cross_entropy.mean(1).sum(), (1 - (common + 1) / (both + 1)).sum()


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Return [N, C, P], the values of maps [N, C, h, w] at points [N, P, 2] (x, y) in 0..1."""
    values = F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)
    return values[..., 0]


@torch.no_grad()
def uncertain_points(masks: Tensor, num_points: int) -> Tensor:
    """Return points [N, num_points, 2] for the loss of mask logits [N, 1, h, w].

    Most of them are those of many random points where the logits are nearest to zero (Kirillov et
    al., arXiv:1912.08193, section 3.1), the others random.
    """
    candidates = torch.rand(len(masks), OVERSAMPLING * num_points, 2, device=masks.device)
    certainty = sample(masks, candidates)[:, 0].abs()
    num_uncertain = int(UNCERTAIN_SHARE * num_points)
    chosen = certainty.topk(num_uncertain, dim=1, largest=False).indices
    uncertain = candidates.gather(1, chosen[:, :, None].expand(-1, -1, 2))
    others = torch.rand(len(masks), num_points - num_uncertain, 2, device=masks.device)
    return torch.cat([uncertain, others], dim=1)
