"""Augmentation policies by the names that timm gives them: the notation, and what it stands for.

Invariant: a policy that is not understood in full is refused, never applied in part.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.augmix import AugMix
from data.autoaugment import POLICIES, AutoAugment
from data.base import DataError
from data.operations import MAX_LEVEL, Canvas, Severity
from data.randaugment import INCREASING, PLAIN, SETS, RandAugment

_UNIFORM_ABOVE = 100  # a deviation that means: uniform


class Policy(Protocol):
    """What a policy can do."""

    @property
    def num_draws(self) -> int:
        """How many uniform numbers an image takes."""
        ...

    def apply(
        self, picture: Image.Image, draws: NDArray[np.float64], canvas: Canvas
    ) -> Image.Image:
        """Apply the policy to an RGB picture; `draws` are `num_draws` uniform numbers."""
        ...


@cache
def parse_policy(text: str) -> Policy:
    """Parse a policy; raises DataError naming the part in error.

    - `rand-m9-mstd0.5-inc1` is RandAugment: m is the magnitude, n the number of operations, p
      their probability, mstd the magnitude's deviation (above 100: uniform from 0), mmax its
      limit; inc1 asks for severities that increase, t names a set of operations (tweights, t3a,
      t3aw).
    - `original`, `originalr`, `v0`, `v0r` and `3a` are AutoAugment's policies, as in `v0-mstd0.5`.
    - `augmix-m3-w3` is AugMix: m is the magnitude, w the number of chains, d their length (0: 1 to
      3), a the α of their weights, mstd as above but uniform where it is left out. b, timm's other
      way to compute the same, changes nothing.
    """
    head, *sections = text.split("-")
    if head == "rand":
        return _rand_augment(text, sections)
    if head == "augmix":
        return _augmix(text, sections)
    if head not in POLICIES:
        known = ", ".join(("rand-…", "augmix-…", *POLICIES))
        raise DataError(f"augmentation policy {text!r}: {head!r} is not one of {known}")
    values = _numbers(text, sections, ("mstd",))
    severity = Severity(magnitude_std=values.get("mstd", 0.0))
    return AutoAugment(sub_policies=POLICIES[head], severity=severity)


def keeps_color_jitter(auto_augment: str | None) -> bool:
    """Return whether colour jitter is applied beside a policy: with none, and with 3-Augment.

    The others leave it out, as timm does, and so the published recipes did, whatever they name.
    """
    return auto_augment is None or "3a" in auto_augment


def _rand_augment(text: str, sections: list[str]) -> RandAugment:
    names = [section[1:] for section in sections if section.startswith("t")]
    numbers = [section for section in sections if not section.startswith("t")]
    values = _numbers(text, numbers, ("m", "n", "p", "mstd", "mmax", "inc"))
    for name in names:
        if name not in SETS:
            known = ", ".join(f"t{known}" for known in SETS)
            raise DataError(f"augmentation policy {text!r}: 't{name}' is not one of {known}")
    everything = INCREASING if values.get("inc", 0) else PLAIN
    chosen = SETS[names[-1]] if names else everything
    spread = values.get("mstd", 0.0)
    return RandAugment(
        magnitude=values.get("m", MAX_LEVEL),
        num_ops=int(values.get("n", 2)),
        prob=values.get("p", 0.5),
        severity=Severity(
            magnitude_std=math.inf if spread > _UNIFORM_ABOVE else spread,
            max_magnitude=values.get("mmax", MAX_LEVEL),
        ),
        operations=tuple(chosen),
        weights=tuple(chosen.values()) if isinstance(chosen, dict) else None,
    )


def _augmix(text: str, sections: list[str]) -> AugMix:
    values = _numbers(text, sections, ("m", "w", "d", "a", "mstd", "b"))
    return AugMix(
        magnitude=values.get("m", 3.0),
        width=int(values.get("w", 3)),
        depth=int(values.get("d", 0)),
        alpha=values.get("a", 1.0),
        severity=Severity(magnitude_std=values.get("mstd", math.inf)),
    )


def _numbers(text: str, sections: list[str], known: tuple[str, ...]) -> dict[str, float]:
    """Parse sections such as `m9`; raises DataError for any that is not of a known name."""
    values: dict[str, float] = {}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        if match is None or match[1] not in known:
            raise DataError(
                f"augmentation policy {text!r}: {section!r} is not one of "
                + ", ".join(f"{key}<number>" for key in known)
            )
        values[match[1]] = float(match[2])
    return values
