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

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.worlds.jepa.regularizers import AllMean, alone

KNOTS, REACH = 17, 3.0


@functools.cache
def quadrature(knots: int = KNOTS) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots t on [0, 3] and the weights of |ecf - normal|^2 at them, exp(-t^2 / 2) included."""
    step = REACH / (knots - 1)
    t = [i * step for i in range(knots)]
    ends = {0, knots - 1}
    weight = [step if i in ends else 2 * step for i in range(knots)]
    normal = torch.exp(-torch.tensor(t, dtype=torch.float64).square() / 2).tolist()
    return tuple(t), tuple(w * p for w, p in zip(weight, normal, strict=True))


def directions(
    dim: int, count: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Float[Tensor, "d k"]:
    """`count` random unit vectors, in fp32."""
    return F.normalize(torch.randn(dim, count, generator=generator, device=device), dim=0)


def sigreg(
    z: Float[Tensor, "... n d"],
    directions: Float[Tensor, "d k"],
    *,
    scale_by_n: bool = True,
    all_mean: AllMean = alone,
    world: int = 1,
) -> Float[Tensor, ""]:
    """Mean of the statistic over directions, and over what stands before n (views, time steps).

    Args:
        scale_by_n: times N, as in LeJEPA and LeWM; eb_jepa leaves the factor out.
        all_mean, world: over processes, each of which has N / world of the latents.
    """
    t, weight = (torch.tensor(x, device=z.device) for x in quadrature())
    with torch.autocast(z.device.type, enabled=False):
        h = z.to(torch.promote_types(z.dtype, torch.float32)) @ directions  # [..., n, k]
    angle = h[..., None] * t  # [..., n, k, knots]
    cos, sin = all_mean(angle.cos().mean(dim=-3)), all_mean(angle.sin().mean(dim=-3))
    apart = (cos - torch.exp(-t.square() / 2)).square() + sin.square()
    statistic = (apart * weight).sum(dim=-1).mean()
    return statistic * (z.shape[-2] * world) if scale_by_n else statistic
