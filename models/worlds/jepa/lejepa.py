"""Joint embedding of views of an image: LeJEPA, and what it is compared with.

LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics, 2025,
arXiv:2511.08544. Views v of an image n are encoded and projected,

    z_nv = projector(encoder(x_nv))
    invariance = mean over n, v of (z_nv - mean over global views of z_n)^2

and the recipe adds what keeps z from collapsing: SIGReg of each view, or VICReg's terms (2021,
arXiv:2105.04906). With an averaged network as the target (BYOL, 2020, arXiv:2006.07733) a predictor
foretells the average's projection of the other views.

Dimensions: b images, v views, d width of a projection.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.jepa.config import LeJEPAConfig
from models.worlds.jepa.encoders import FrameEncoder
from models.worlds.jepa.targets import Latents


class Projector(nn.Module):
    """Linear layers with BatchNorm and a nonlinearity between them, over rows of whatever shape."""

    def __init__(self, widths: list[int], activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), activation()]
        self.layers = nn.Sequential(*layers[:-2])

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        return self.layers(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class Projected(nn.Module):
    """An encoder and the projector behind it."""

    def __init__(self, config: LeJEPAConfig) -> None:
        super().__init__()
        assert config.channels is not None and config.image_size is not None
        self.encoder = FrameEncoder(config.encoder, config.channels, config.image_size)
        widths = [config.encoder.dim, *config.projector]
        self.projector = Projector(widths) if config.projector else nn.Identity()
        self.dim = widths[-1]

    def forward(self, views: Float[Tensor, "b v c s s"]) -> Float[Tensor, "b v d"]:
        return self.projector(self.encoder(views))


class LeJEPA(nn.Module):
    """The encoder with its projector, and an average of both if the target is one.

    Args:
        averaged: keep an average for the targets, and a predictor of what it says.
    """

    def __init__(self, config: LeJEPAConfig, averaged: bool = False) -> None:
        super().__init__()
        if config.channels is None or config.image_size is None:
            raise ValueError("model.channels and image_size must be known")
        self.encoder = Projected(config)
        self.average = Projected(config).requires_grad_(False) if averaged else None
        d = self.encoder.dim
        self.predictor = Projector([d, *config.predictor, d]) if averaged else None

    def forward(
        self,
        views: Float[Tensor, "b v c s s"],
        local: Float[Tensor, "b w c r r"] | None = None,
    ) -> Latents:
        """Projections of all views; what they should be is of the global ones alone.

        Args:
            views: global views, two or more with an average.
            local: smaller views of small parts.
        """
        z = self.encoder(views)  # [b, v, d]
        every = z if local is None else torch.cat([z, self.encoder(local)], dim=1)
        if self.average is None or self.predictor is None:
            return Latents(every, every, z.mean(dim=1, keepdim=True).expand_as(every))
        kept = self.average(views)
        others = (kept.sum(dim=1, keepdim=True) - kept) / (kept.shape[1] - 1)
        if local is not None:
            rest = kept.mean(dim=1, keepdim=True).expand(-1, local.shape[1], -1)
            others = torch.cat([others, rest], dim=1)
        return Latents(every, self.predictor(every), others)

    def embed(self, images: Float[Tensor, "n c s s"]) -> Float[Tensor, "n e"]:
        """Latents before the projector: what a probe reads."""
        return self.encoder.encoder(images[:, None])[:, 0]
