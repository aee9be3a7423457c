"""SIGReg: how far the latents' projections are from a standard normal distribution.

LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics, 2025,
arXiv:2511.08544. With K random unit directions a_k, and h = a_k . z of N latents:

    ecf_k(t) = mean over n of exp(i t h_n)
    stat_k   = N integral |ecf_k(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt      over [-3, 3]
    SIGReg   = mean over k of stat_k

The integral is a trapezoid over 17 knots on [0, 3], doubled for the other half. In closed form it
is 1.0525 for normal latents whatever N and D are, and 0.40205 N for latents that are all 0.

What it does not see: coordinates that are uniform, or points on a sphere, once D is large, since
their projections are normal already; that latents of one trajectory are all alike, as it looks at
one time step at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.sigreg.op import characteristic_function
from models.worlds.jepa.quadrature import KNOTS, STEP, quadrature
from models.worlds.jepa.regularizers import AllMean, alone


def directions(
    dim: int, count: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Float[Tensor, "d k"]:
    """`count` random unit vectors, in fp32."""
    return F.normalize(torch.randn(dim, count, generator=generator, device=device), dim=0)


def sigreg(
    z: Float[Tensor, "*g n d"],
    directions: Float[Tensor, "d k"],
    *,
    scale_by_n: bool = True,
    all_mean: AllMean = alone,
    world: int = 1,
    impl: str = "auto",
) -> Float[Tensor, ""]:
    """Mean of the statistic over directions, and over what stands before n (views, time steps).

    Args:
        scale_by_n: times N, as in LeJEPA and LeWM; eb_jepa leaves the factor out.
        all_mean, world: over processes, each of which has N / world of the latents.
        impl: of `kernels.characteristic_function`.
    """
    t, weight = (torch.tensor(x, device=z.device)[:, None] for x in quadrature())  # [j, 1]
    with torch.autocast(z.device.type, enabled=False):
        h = z.to(torch.promote_types(z.dtype, torch.float32)) @ directions  # [*g, n, k]
    cos, sin = characteristic_function(h, STEP, KNOTS, impl=impl)  # [*g, j, k]
    apart = (all_mean(cos) - torch.exp(-t.square() / 2)).square() + all_mean(sin).square()
    statistic = (apart * weight).sum(dim=-2).mean()
    return statistic * (z.shape[-2] * world) if scale_by_n else statistic
