"""The design space of diffusion models: preconditioning, noise levels, steps.

Elucidating the Design Space of Diffusion-Based Generative Models, 2022, arXiv:2206.00364 (EDM),
table 1. With the noise of DIAMOND (2024, arXiv:2405.12399), which besides sigma has an offset, one
number for each channel of a frame:

    noisy = x + sigma_offset m + sigma n        s^2 = sigma^2 + sigma_offset^2
    D     = c_skip noisy + c_out F(c_in noisy, c_noise)

where F is the network, D the clean frame that it tells, and F has to tell (x - c_skip noisy) /
c_out. Pure functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Scales(NamedTuple):
    """c_in, c_skip, c_out and c_noise, each of the shape of sigma."""

    into: Float[Tensor, " ..."]
    skip: Float[Tensor, " ..."]
    out: Float[Tensor, " ..."]
    noise: Float[Tensor, " ..."]


def precondition(
    sigma: Float[Tensor, " ..."], sigma_data: float, sigma_offset: float = 0.0
) -> Scales:
    """The four of them, for noise `sigma`: c_in = 1 / sqrt(s^2 + d^2), c_skip = (d c_in)^2,
    c_out = s d c_in, c_noise = ln(s) / 4, where d is `sigma_data`."""
    s = (sigma.square() + sigma_offset**2).sqrt()
    into = (s.square() + sigma_data**2).rsqrt()
    return Scales(into, (sigma_data * into).square(), s * sigma_data * into, s.log() / 4)


def karras_grid(
    steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> Float[Tensor, " n"]:
    """Noise levels from `sigma_max` down to `sigma_min`, evenly spaced in sigma^(1 / rho), then 0.

    One step alone starts at `sigma_max`.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.cat([(high + share * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
