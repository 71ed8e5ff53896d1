"""LAMB: Adam's direction, with a step in proportion to each parameter's own norm.

For batches of tens of thousands of images (https://arxiv.org/abs/1904.00962, algorithm 2). Norms
are those of whole parameters, wherever their parts are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LAMB(torch.optim.Optimizer):
    """LAMB over local parts of parameters, whose state `trainer.optim.make_state` makes.

    As in the authors' code, parameters without weight decay take Adam's step as it is: groups say
    by `decayed` which those are. `sum_over_shards` adds numbers up over the processes that hold
    the other parts. Set `found_inf` (float32 [], on the device) before each step: 1.0 leaves the
    step out.
    """

    found_inf: Tensor

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        sum_over_shards: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.betas = betas
        self.eps = eps
        self.sum_over_shards = sum_over_shards

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure here
        """Step every parameter that has a gradient, whose memory is used up."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            moves = self._adam(weights)
            torch._foreach_add_(moves, weights, alpha=group["weight_decay"])
            if group["decayed"]:
                torch._foreach_mul_(moves, self._trust_ratios(weights, moves))
            torch._foreach_mul_(moves, -group["lr"] * (1 - self.found_inf))
            torch._foreach_add_(weights, moves)

    def _adam(self, weights: list[Tensor]) -> list[Tensor]:
        """Update the moments; return Adam's directions."""
        beta1, beta2 = self.betas
        skipped = self.found_inf.bool()
        grads = [
            weight.grad.masked_fill_(skipped, 0.0) for weight in weights if weight.grad is not None
        ]
        steps, firsts, seconds = (
            [self.state[weight][name] for weight in weights]
            for name in ("step", "exp_avg", "exp_avg_sq")
        )
        torch._foreach_add_(steps, 1 - self.found_inf)
        # Without gradients, and with a decay of 1, moments stay what they are.
        torch._foreach_mul_(firsts, torch.where(skipped, 1.0, beta1))
        torch._foreach_mul_(seconds, torch.where(skipped, 1.0, beta2))
        torch._foreach_add_(firsts, grads, alpha=1 - beta1)
        torch._foreach_addcmul_(seconds, grads, grads, value=1 - beta2)
        step = steps[0].clamp(min=1)  # a first step that is left out divides by no zero
        scales = torch._foreach_sqrt(seconds)
        torch._foreach_div_(scales, (1 - beta2**step).sqrt())
        torch._foreach_add_(scales, self.eps)
        moves = torch._foreach_div(firsts, scales)
        torch._foreach_div_(moves, 1 - beta1**step)
        return list(moves)

    def _trust_ratios(self, weights: list[Tensor], moves: list[Tensor]) -> list[Tensor]:
        """The norm of each parameter over that of its direction, 1 where either is 0."""
        squares = torch.stack(torch._foreach_norm([*weights, *moves])).square()
        ours, theirs = self.sum_over_shards(squares).sqrt().chunk(2)
        ratios = torch.where((ours > 0) & (theirs > 0), ours / theirs, torch.ones_like(ours))
        return list(ratios)
