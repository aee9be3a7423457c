"""Gaussians as samples of a chain: the dead move to where the living are, and all of them stir.

3D Gaussian Splatting as Markov Chain Monte Carlo (2024, arXiv:2404.09591). A Gaussian of opacity o
that becomes n of them leaves the image as it was, as nearly as may be, if each has

    o_n = 1 - (1 - o)^(1/n)
    s_n = s o / sum_{i=1..n} sum_{k=0..i-1} C(i-1, k) (-1)^k o_n^(k+1) / sqrt(k+1)

and every step moves means by Sigma z, z ~ N(0, 1), the more the less opaque they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.splats.project import rotations
from models.worlds.splats.gaussians import Edit

MOST_COPIES = 51
DEAD = 0.005
"Opacity up to which a Gaussian is dead, and that no copy falls below."


@cache
def _binomials() -> Float[Tensor, "51 51"]:
    """C(i, k) (-1)^k / sqrt(k + 1), in float64: the sum alternates."""
    table = torch.zeros(MOST_COPIES, MOST_COPIES, dtype=torch.float64)
    row = torch.zeros(MOST_COPIES, dtype=torch.float64)
    row[0] = 1.0
    for i in range(MOST_COPIES):
        table[i] = row
        row = row + torch.cat([row.new_zeros(1), row[:-1]])
    k = torch.arange(MOST_COPIES, dtype=torch.float64)
    return table * (-1) ** k / (k + 1).sqrt()


def shared_out(
    opacities: Float[Tensor, " n"], scales: Float[Tensor, "n 3"], copies: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
    """Opacity and scales of each of so many copies (with the first one), 1 to MOST_COPIES."""
    o, n = opacities.double(), copies.double()
    each = 1 - (1 - o) ** (1 / n)
    powers = each[:, None] ** torch.arange(1, MOST_COPIES + 1, device=o.device)  # [n k]
    terms = torch.einsum("ik,nk->ni", _binomials().to(o.device), powers)
    counted = torch.arange(MOST_COPIES, device=o.device) < copies[:, None]
    factor = o / torch.where(counted, terms, 0.0).sum(-1)
    each = each.clamp(DEAD, 1 - torch.finfo(torch.float32).eps)
    return each.to(opacities), (scales.double() * factor[:, None]).to(scales)


def relocate(fields: Mapping[str, Tensor], target: int, generator: torch.Generator) -> Edit:
    """The dead become copies of living ones, drawn by their opacity, and so many more are added
    that there are `target`. All those that were copied count as new."""
    opacities = fields["opacities"].sigmoid()
    alive = torch.nonzero(opacities > DEAD)[:, 0]
    n = len(opacities)
    wanted = max(target, n) - len(alive)
    if not len(alive) or not wanted:
        return Edit(
            torch.arange(n, device=opacities.device), {name: x[:0] for name, x in fields.items()}
        )
    weights = opacities[alive].double().cpu()
    drawn = torch.multinomial(weights, wanted, replacement=True, generator=generator)
    copies = torch.bincount(drawn, minlength=len(alive)).clamp_max(MOST_COPIES - 1).to(alive.device)
    chosen, copies = alive[copies > 0], copies[copies > 0] + 1
    o, s = shared_out(opacities[chosen], fields["scales"][chosen].exp(), copies)
    new = {name: x[chosen] for name, x in fields.items()}
    new |= {"opacities": torch.logit(o), "scales": s.log()}
    stay = torch.ones(n, dtype=torch.bool, device=alive.device)
    stay[chosen], stay[opacities <= DEAD] = False, False
    return Edit(
        torch.nonzero(stay)[:, 0],
        {name: x.repeat_interleave(copies, 0) for name, x in new.items()},
    )


def stir(
    fields: Mapping[str, Tensor], rate: float, generator: torch.Generator
) -> Float[Tensor, "n 3"]:
    """How far means move by chance: rate x Sigma z, nearly 0 for what is opaque."""
    opacities = fields["opacities"].sigmoid()
    z = torch.randn(len(opacities), 3, generator=generator).to(opacities)
    R, variances = rotations(fields["quats"]), (2 * fields["scales"]).exp()
    moved = torch.einsum("nij,nj,nkj,nk->ni", R, variances, R, z)
    return moved * torch.sigmoid(-100 * (opacities - DEAD))[:, None] * rate
