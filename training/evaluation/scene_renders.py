"""What a scene shows to cameras, a few at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.splats.op import rasterize
from models.worlds.splats.gaussian_splatting import GaussianSplatting
from models.worlds.splats.gaussians import Fields
from training.data.posed import Posed

AT_ONCE = 4  # views


@torch.no_grad()
def rendered(
    model: GaussianSplatting, scene: Fields, posed: Posed, background: tuple[float, ...],
    device: torch.device,
) -> tuple[Float[Tensor, "v h w 3"], Float[Tensor, "v h w"]]:  # fmt: skip
    """Colours in [0, 1] and depths of views of some of a model's Gaussians, on the CPU.

    Args:
        scene: as `rasterize` takes it.
    """
    _, height, width, _ = posed.images.shape
    light = torch.tensor(background, device=device)
    colors, depths = [], []
    for first in range(0, len(posed.names), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        viewmats, Ks = (torch.from_numpy(x[some]).to(device) for x in (posed.viewmats, posed.Ks))
        seen = rasterize(
            **scene, viewmats=viewmats, Ks=Ks, width=width, height=height, background=light,
            antialiased=model.config.antialiased, tile=model.config.tile,
        )  # fmt: skip
        colors.append(model.exposed(seen.color, None).clamp(0, 1).cpu())
        depths.append(seen.depth.cpu())
    return torch.cat(colors), torch.cat(depths)
