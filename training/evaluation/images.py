"""How alike images are."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from training.evaluation import pinfall


def psnr(told: Float[Tensor, "v h w 3"], truth: Float[Tensor, "v h w 3"]) -> Float[Tensor, " v"]:
    """Decibels, of each image whose values are from 0 to 1; at most 100."""
    error = (told.double() - truth.double()).square().mean((1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def ssim(told: Float[Tensor, "v h w 3"], truth: Float[Tensor, "v h w 3"]) -> Float[Tensor, " v"]:
    """Of each image."""
    x, y = (each.permute(0, 3, 1, 2)[None] for each in (told, truth))
    return pinfall.ssim(x, y)
