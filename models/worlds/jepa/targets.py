"""What a prediction is compared with: the encoder itself, or an average of its past weights.

The average (EMA, exponential moving average) is that of BYOL (2020, arXiv:2006.07733), I-JEPA
(2023, arXiv:2301.08243) and V-JEPA: with it and without a gradient through the target, an encoder
need not collapse, although nothing in the loss forbids it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Latents(NamedTuple):
    """What one pass through a model gives a training step."""

    z: Float[Tensor, "b t d"]  # of what is seen: the terms against collapse are about these
    predicted: Float[Tensor, "b s d"]
    target: Float[Tensor, "b s d"]  # what `predicted` should be
    told: Float[Tensor, "b t-1 a"] | None = None  # the action between two latents


def decay_at(step: int, steps: int, first: float, last: float = 1.0) -> float:
    """The decay of the average at a step: from `first` to `last` in a straight line."""
    return first + (last - first) * min(1.0, step / max(1, steps))


@torch.no_grad()
def follow(average: nn.Module, online: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) online; buffers are taken over as they are."""
    for kept, new in zip(average.parameters(), online.parameters(), strict=True):
        kept.lerp_(new.to(kept.dtype), 1 - decay)
    for kept, new in zip(average.buffers(), online.buffers(), strict=True):
        kept.copy_(new)
