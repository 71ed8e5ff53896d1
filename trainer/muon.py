"""Muon: momentum made orthogonal for the matrices of hidden layers, AdamW for the rest.

From https://kellerjordan.github.io/posts/muon/ with the scale of https://arxiv.org/abs/2502.16982,
which moves a matrix as far as AdamW does, so that its learning rate and weight decay serve both.
torch.optim.Muon cannot take parts of matrices, nor leave a step out without a host sync.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .shares import whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2  # of AdamW's usual steps


class Muon(torch.optim.AdamW):
    """Muon over local parts of parameters, whose state `trainer.optim.make_state` makes.

    Groups say by `orthogonal` whether theirs are matrices to Muon; a convolution's weight counts
    as one with a row for each output. `dress` turns the name and a local tensor of a parameter
    into a DTensor, or returns the tensor where it is whole: each process then gathers every
    matrix, and makes it orthogonal itself. Set `found_inf` (float32 [], on the device) before each
    step: 1.0 leaves the step out.
    """

    found_inf: Tensor

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        names: Mapping[Tensor, str],
        dress: Callable[[str, Tensor], Tensor],
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.names = names
        self.dress = dress
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure here
        """Step every parameter that has a gradient; matrices give theirs up."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_matrices(group)
        super().step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        keep = 1 - self.found_inf
        torch._foreach_add_([self.state[weight]["step"] for weight in weights], keep)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * keep)
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, direction in zip(weights, self._directions(weights), strict=True):
            weight.grad = None  # AdamW passes over it
            dressed = self.dress(self.names[weight], direction)
            alike[dressed.shape].append((weight, dressed))
        for shape, members in alike.items():  # matrices of a shape go through together
            matrices = torch.stack([whole(dressed).flatten(1) for _, dressed in members])
            scale = RMS * math.sqrt(max(matrices.shape[1:])) * group["lr"]
            moves = orthogonalise(matrices) * (scale * keep)
            for (weight, dressed), move in zip(members, moves, strict=True):
                weight.sub_(_part(move.view(shape), dressed))

    def _directions(self, weights: list[Tensor]) -> list[Tensor]:
        """Update the momentum; return Nesterov's look ahead."""
        skipped = self.found_inf.bool()
        grads = [
            weight.grad.masked_fill_(skipped, 0.0) for weight in weights if weight.grad is not None
        ]
        firsts = [self.state[weight]["exp_avg"] for weight in weights]
        # Without gradients, and with a decay of 1, the momentum stays what it is.
        torch._foreach_mul_(firsts, torch.where(skipped, 1.0, self.momentum))
        torch._foreach_add_(firsts, grads, alpha=1 - self.momentum)
        return list(torch._foreach_lerp(grads, firsts, self.momentum))


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices [K, M, N] with the same singular vectors and singular values of about 1.

    Five Newton-Schulz iterations of a quintic, in bfloat16 on GPUs, as published: the values end
    between 0.7 and 1.2. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _part(tensor: Tensor, dressed: Tensor) -> Tensor:
    """What this process holds of a tensor that all have whole, divided as `dressed` is."""
    if not isinstance(dressed, DTensor):
        return tensor
    mesh, placements = dressed.device_mesh, dressed.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
