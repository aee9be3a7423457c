"""Where Gaussians are added and taken away: adaptive density control.

3D Gaussian Splatting for Real-Time Radiance Field Rendering (2023, arXiv:2308.04079), section 5.
What the loss pulls at in the image, on the average over the views that show it, is not well
described by the Gaussian that is there:

    pull > `pull_least`, and it is small     another one like it
    pull > `pull_least`, and it is large     two in its place, 1.6 times smaller, drawn from it
    hardly opaque, or far too large          gone

If there is no room for all, those are treated that are pulled at most.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.splats.project import rotations
from models.worlds.splats.gaussians import Edit

SHRINK = 1.6
"How much smaller the two are that take the place of one."


def densify(
    fields: Mapping[str, Tensor],
    pull: Float[Tensor, " n"],
    room: int,
    generator: torch.Generator,
    *,
    pull_least: float,
    small: float,
    opacity_least: float,
    largest: float,
    revised: bool = False,
) -> Edit:
    """Clones, halves and removals.

    Args:
        pull: mean size of the gradient of the centre, in half widths and heights of the image.
        room: most Gaussians there may be.
        small: standard deviation up to which one is cloned. largest: beyond which it is removed.
        revised: halves share their light: 1 - (1 - o')^2 = o (Revising Densification, 2024,
            arXiv:2404.06109); otherwise both are as opaque as the one was.
    """
    widest = fields["scales"].exp().amax(-1)
    gone = (fields["opacities"].sigmoid() < opacity_least) | (widest > largest)
    wanted = torch.where(gone | (pull <= pull_least), 0.0, pull)
    most = max(0, room - int((~gone).sum()))
    chosen = torch.zeros_like(gone)
    chosen[wanted.topk(min(most, len(wanted))).indices] = True
    chosen &= wanted > 0
    clone, split = chosen & (widest <= small), chosen & (widest > small)

    def copied(rows: Tensor) -> dict[str, Tensor]:
        return {name: x[rows] for name, x in fields.items()}

    clones, halves = copied(clone), copied(split)
    halves = {name: x.repeat_interleave(2, 0) for name, x in halves.items()}
    z = torch.randn(len(halves["means"]), 3, generator=generator).to(halves["means"])
    scales = halves["scales"].exp()
    halves["means"] = (
        halves["means"] + (rotations(halves["quats"]) @ (scales * z)[..., None])[..., 0]
    )
    halves["scales"] = (scales / SHRINK).log()
    if revised:
        halves["opacities"] = torch.logit(1 - (1 - halves["opacities"].sigmoid()).sqrt())
    stay = torch.nonzero(~gone & ~split)[:, 0]
    return Edit(stay, {name: torch.cat([clones[name], halves[name]]) for name in fields})
