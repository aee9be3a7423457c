"""What keeps an encoder from mapping everything to one point, and what shapes its space.

A predictor in latent space is right at once if the encoder says the same of every image. Terms of
a loss against that, as pure functions of latents:

    standard deviation   mean over features of max(0, 1 - sqrt(var + 1e-4))
    covariance           mean of the squared covariances of different features
                         (both: VICReg, 2021, arXiv:2105.04906, divided as in PLDM, 2025,
                         arXiv:2502.14819: by D (D - 1), where VICReg divides by D)
    time similarity      mean of (z_t+1 - z_t)^2 (PLDM)
    inverse dynamics     mean of (a_t - g(z_t, z_t+1))^2 (PLDM)
    SIGReg               distance of random projections from a normal distribution
                         (LeJEPA, 2025, arXiv:2511.08544), in sigreg.py

Variances are those of a sample (n - 1). With several processes the statistics are of all rows
together: each passes its rows' moments through `all_mean`.

What they do not see: the covariance of a collapsed encoder is 0, so that it needs the standard
deviation beside it; rows of one trajectory are not independent, so that features which are slow,
as where a wall stands, satisfy both without saying anything of the agent (Sobal et al., 2022,
arXiv:2211.10831).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

AllMean = Callable[[Tensor], Tensor]
"Mean of a tensor over the processes, through which gradients flow."


def alone(x: Tensor) -> Tensor:
    """The mean over one process."""
    return x


def moments(
    z: Float[Tensor, "n d"], all_mean: AllMean = alone, world: int = 1
) -> Float[Tensor, "d d"]:
    """Covariance matrix of the rows of all processes, in fp32 at least."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    n = len(z) * world
    z = z - all_mean(z.mean(dim=0)).detach()  # the gradient through the mean of all rows is 0
    with torch.autocast(z.device.type, enabled=False):
        return all_mean(z.mT @ z / len(z)) * (n / (n - 1))


def hinge_std(covariance: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
    """How far features fall short of a standard deviation of 1: 0.99 where all are constant."""
    std = (covariance.diagonal() + 1e-4).sqrt()
    return (1 - std).relu().mean()


def off_diagonal(covariance: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
    """Mean square of the covariances of different features: 1 where all features are one."""
    d = len(covariance)
    if d < 2:
        return covariance.new_zeros(())
    # Not sum - diagonal: that would lose what is small beside it.
    apart = covariance * (1 - torch.eye(d, device=covariance.device, dtype=covariance.dtype))
    return apart.square().sum() / (d * (d - 1))


def time_similarity(z: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
    """Mean square of a step in latent space."""
    return (z[:, 1:] - z[:, :-1]).square().mean()


def inverse_dynamics(
    told: Float[Tensor, "b t-1 a"], actions: Float[Tensor, "b t-1 a"]
) -> Float[Tensor, ""]:
    """Error of what was told of the actions between latents."""
    return (told - actions).square().mean()


def straightness(z: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
    """Mean cosine between a step in latent space and the next: 1 on straight lines."""
    steps = z[:, 1:] - z[:, :-1]
    return torch.cosine_similarity(steps[:, 1:], steps[:, :-1], dim=-1).mean()
