"""A scene of Gaussians that moves: what is seen of it at a time.

Dynamic 3D Gaussians (2023, arXiv:2308.09713), and its rivals: `model.motion` says by what Gaussians
move (motions.py, tracked.py). Without a time the scene is seen as if nothing did.

Dimensions: m places for Gaussians, t times.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from models.worlds.splats.config import DynamicGaussiansConfig, Motion
from models.worlds.splats.gaussian_splatting import GaussianSplatting
from models.worlds.splats.gaussians import Fields
from models.worlds.splats.motions import Deformation, HexPlane, Polynomial, Still
from models.worlds.splats.tracked import Tracked


class DynamicGaussians(GaussianSplatting):
    """Renders at times, with gradients to everything."""

    config: DynamicGaussiansConfig

    def __init__(
        self,
        config: DynamicGaussiansConfig,
        views: int = 0,
        box: Float[Tensor, "2 3"] | None = None,
        times: Float[Tensor, " t"] | None = None,
    ) -> None:
        """
        Args:
            views: as of `GaussianSplatting`.
            box: lower and upper corner of where things move; None: of -1 and 1.
            times: that Gaussians are tracked at; None: 0 and 1.
        """
        motion = motion_of(
            config,
            torch.tensor([[-1.0] * 3, [1.0] * 3]) if box is None else box,
            torch.tensor([0.0, 1.0]) if times is None else times,
        )
        super().__init__(config, views, motion.rows)
        self.motion = motion

    def scene(self, time: float | None = None) -> Fields:
        fields, scene = self.gaussians.fields(), super().scene()
        return scene if time is None else self.motion(scene, fields, time)


def motion_of(
    config: DynamicGaussiansConfig, box: Float[Tensor, "2 3"], times: Float[Tensor, " t"]
) -> Still:
    """By what Gaussians move."""
    if config.motion == Motion.deformation:
        return Deformation(config, box)
    if config.motion == Motion.hexplane:
        return HexPlane(config, box)
    if config.motion == Motion.polynomial:
        return Polynomial()
    if config.motion == Motion.tracked:
        return Tracked(times, config.capacity)
    return Still()
