"""A scene of Gaussians, and what corrects the cameras and the light of the images it is told by.

3D Gaussian Splatting for Real-Time Radiance Field Rendering (2023, arXiv:2308.04079). What is seen
of it is `rasterize`'s (kernels/splats/op.py). Of each image that is trained on may be learned,
besides,

    a pose         world to camera = exp(twist) times what was said
    an exposure    color = A color + b, [A b] = [1 0] at first

Dimensions: c cameras, n Gaussians, v images that are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.splats.op import Render, rasterize
from models.worlds.splats.config import GaussianSplattingConfig
from models.worlds.splats.gaussians import Fields, Gaussians, activated


class GaussianSplatting(nn.Module):
    """Renders, with gradients to everything."""

    def __init__(
        self,
        config: GaussianSplattingConfig,
        views: int = 0,
        extra: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """
        Args:
            views: images that have a pose and an exposure of their own; 0: none.
            extra: as of `Gaussians`.
        """
        super().__init__()
        self.config = config
        self.gaussians = Gaussians(config.capacity, config.degree, extra)
        self.twists = nn.Parameter(torch.zeros(views, 6))
        self.exposures = nn.Parameter(torch.eye(3, 4).repeat(views, 1, 1))

    def scene(self, time: float | None = None) -> Fields:
        """The Gaussians as `rasterize` takes them; they are the same at all times."""
        return activated(self.gaussians.fields())

    def forward(
        self,
        viewmats: Float[Tensor, "c 4 4"],
        Ks: Float[Tensor, "c 3 3"],
        width: int,
        height: int,
        *,
        background: Float[Tensor, 3] | None = None,
        degree: int | None = None,
        views: Int[Tensor, " c"] | None = None,
        probe: Float[Tensor, "c n 2"] | None = None,
        time: float | None = None,
        impl: str = "auto",
    ) -> Render:
        """What cameras see.

        Args:
            degree: of the harmonics that are looked at; None: all.
            views: numbers of images that are trained on, whose corrections apply.
            probe: as of `rasterize`.
            time: of what moves, from 0 to 1.
        """
        scene = self.scene(time)
        if degree is not None:
            scene["sh"] = scene["sh"][:, : (degree + 1) ** 2]
        if views is not None:
            viewmats = exponential(self.twists[views]) @ viewmats
        return rasterize(
            scene["means"], scene["quats"], scene["scales"], scene["opacities"], viewmats, Ks,
            width, height, sh=scene["sh"], background=background, probe=probe, impl=impl,
            antialiased=self.config.antialiased, tile=self.config.tile,
        )  # fmt: skip

    def exposed(self, color: Float[Tensor, "c h w 3"], views: Int[Tensor, " c"] | None) -> Tensor:
        """Colours in the light of images that are trained on; in their mean light without."""
        if not len(self.exposures):
            return color
        light = self.exposures.mean(0, keepdim=True) if views is None else self.exposures[views]
        A, b = light.expand(len(color), 3, 4).split([3, 1], dim=-1)
        return torch.einsum("cij,chwj->chwi", A, color) + b[:, None, None, :, 0]


def exponential(twists: Float[Tensor, "c 6"]) -> Float[Tensor, "c 4 4"]:
    """Rigid motions of velocities (3) and rotations (3), by the matrix exponential."""
    generator = twists.new_zeros(len(twists), 4, 4)
    vx, vy, vz, x, y, z = twists.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [zero, -z, y, vx, z, zero, -x, vy, -y, x, zero, vz]
    top = torch.stack(rows, dim=-1).unflatten(-1, (3, 4))
    return torch.linalg.matrix_exp(torch.cat([top, generator[:, :1]], dim=1))
