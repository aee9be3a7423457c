"""Discrete noise levels: how much of a frame is left at each, and how errors are weighed.

    x_k = sqrt(abar_k) x + sqrt(1 - abar_k) eps         v = sqrt(abar_k) eps - sqrt(1 - abar_k) x

with levels 0 .. LEVELS - 1 from hardly any noise to nothing but; -1 stands for clean. Denoising
Diffusion Probabilistic Models (2020, arXiv:2006.11239), with the schedules of Improved DDPM (2021,
arXiv:2102.09672; cosine) and of Jabri et al. (2022, arXiv:2212.11972; sigmoid). The weights are
those of Diffusion Forcing (2024, arXiv:2407.01392), whose published code fuses the signal of the
frames before into a frame's weight. Pure functions.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from models.worlds.video.config import Schedule

LEVELS = 1000
MOST = 0.999  # of beta
LOUD, QUIET = 1e-4, 2e-2  # beta of the linear schedule


def signal(schedule: Schedule) -> Float[Tensor, " k"]:
    """abar of levels 0 .. LEVELS - 1, float64."""
    if schedule == Schedule.linear:
        beta = torch.linspace(LOUD, QUIET, LEVELS, dtype=torch.float64)
        return (1 - beta).cumprod(0)
    share = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64)
    if schedule == Schedule.cosine:
        left = torch.cos((share + 0.008) / 1.008 * math.pi / 2).square()
    else:
        left = torch.sigmoid(torch.tensor(3.0)) - torch.sigmoid(6 * share - 3)
    left = left / left[0]
    beta = (1 - left[1:] / left[:-1]).clamp(0, MOST)
    return (1 - beta).cumprod(0)


def with_clean(abar: Float[Tensor, " k"]) -> Float[Tensor, " k1"]:
    """The same with 1 at the end, so that -1 is the index of what is clean."""
    return torch.cat([abar, abar.new_ones(1)])


def ddim_levels(steps: int) -> list[int]:
    """Levels from the last down to -1, evenly spaced, in so many steps."""
    return torch.linspace(-1, LEVELS - 1, steps + 1).round().long().flip(0).tolist()


def noised(x: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x_k."""
    return abar.sqrt() * x + (1 - abar).sqrt() * eps


def velocity(x: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """v."""
    return abar.sqrt() * eps - (1 - abar).sqrt() * x


def velocity_of(x_k: Tensor, x: Tensor, abar: Tensor) -> Tensor:
    """The v that makes x of x_k; 0 where there is no noise."""
    left = (1 - abar).sqrt()
    return torch.where(left > 0, (abar.sqrt() * x_k - x) / left.clamp(min=1e-6), 0.0)


def told_apart(x_k: Tensor, v: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
    """x and eps that x_k and v are made of."""
    x = abar.sqrt() * x_k - (1 - abar).sqrt() * v
    return x, (1 - abar).sqrt() * x_k + abar.sqrt() * v


def snr_weight(
    abar: Float[Tensor, "b t"], clip: float = 5.0, fade: float | None = None
) -> Float[Tensor, "b t"]:
    """Weights of squared errors in v.

    min(snr, clip) / (snr + 1), or, with `fade` g, the same of a signal that the frames before it
    have a part in: with c = min(snr, clip) / clip and n = snr / clip,

        s_t = g s_t-1 + (1 - g) c_t
        fused = 1 - (1 - g s_t-1) (1 - .)        of c, and of n
        weight = clip fused(c) / (clip fused(n) + 1)
    """
    snr = abar / (1 - abar).clamp(min=1e-12)
    if fade is None:
        return snr.clamp(max=clip) / (snr + 1)
    clipped, whole = snr.clamp(max=clip) / clip, snr / clip
    before, sums = torch.zeros_like(snr[:, 0]), []
    for now in clipped.unbind(1):
        sums.append(before)
        before = fade * before + (1 - fade) * now
    lacking = 1 - fade * torch.stack(sums, dim=1)
    return clip * (1 - lacking * (1 - clipped)) / (clip * (1 - lacking * (1 - whole)) + 1)
