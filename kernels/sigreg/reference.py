"""The definition of `characteristic_function`, against which the fast paths are tested.

exp(i t h) averaged over samples, at equally spaced knots t_j = j step (LeJEPA, 2025,
arXiv:2511.08544, equation of the Epps-Pulley statistic):

    cos_jk = mean over n of cos(t_j h_nk)           sin_jk = mean over n of sin(t_j h_nk)

Written to be checked by eye: one knot after the other, no code shared with the fast paths. float64
stays float64; anything narrower than float32 is computed in float32.

Dimensions: g groups (views, time steps), n samples, k directions, j knots.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def characteristic_function(
    h: Float[Tensor, "*g n k"], step: float, knots: int
) -> tuple[Float[Tensor, "*g j k"], Float[Tensor, "*g j k"]]:
    """As `kernels.sigreg.op.characteristic_function`."""
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    cosines = [torch.cos(j * step * h).mean(dim=-2) for j in range(knots)]
    sines = [torch.sin(j * step * h).mean(dim=-2) for j in range(knots)]
    return torch.stack(cosines, dim=-2), torch.stack(sines, dim=-2)
