"""What a sequence of rewards is worth, seen from each of its steps.

Dimensions: b sequences, h steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_returns(
    rewards: Tensor, values: Tensor, ends: Tensor, discount: float, lam: float
) -> Tensor:
    """[b, h] mixtures of returns of all lengths (Sutton and Barto, 2018, chapter 12).

        G_t = r_t + discount (1 - end_t) ((1 - lam) v_{t+1} + lam G_{t+1}),   G_h = v_h

    Args:
        rewards, ends: [b, h], of steps 0 .. h-1; after an end nothing more counts.
        values: [b, h], v_1 .. v_h of what each step led to.
    """
    goes_on = discount * (1 - ends.to(values))
    found, later = [], values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + goes_on[:, t] * ((1 - lam) * values[:, t] + lam * later)
        found.append(later)
    return torch.stack(found[::-1], dim=1)
