"""Tell the latents of parts of an image from those of other parts: I-JEPA.

Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture, 2023,
arXiv:2301.08243.

    z      = encoder(patches of the context)
    s      = norm(average encoder(all patches)),   a LayerNorm without weights
    shat_m = predictor(z, where block m is)        for each target block m by itself
    loss   = smooth L1 of shat_m - s on the patches of block m

What differs: positions reach as far as the grid (vit.py); no depth-dependent initial scale.

Dimensions: b images, n patches, k of them in the context, m target blocks of q patches, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.worlds.jepa.config import IJEPAConfig
from models.worlds.jepa.targets import Latents
from models.worlds.vit import Block, VisionTransformer, positions, take


class MaskPredictor(nn.Module):
    """A narrow transformer over the context's latents and a mask token at every place asked for."""

    def __init__(self, d: int, width: int, depth: int, heads: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.enter = nn.Linear(d, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.leave = nn.Linear(width, d)

    def init_own(self, generator: torch.Generator | None) -> None:
        self.mask_token.normal_(0.0, 0.02, generator=generator)

    def forward(
        self,
        z: Float[Tensor, "b k d"],
        context: Int[Tensor, "b k"],
        targets: Int[Tensor, "b m q"],
    ) -> Float[Tensor, "b m q d"]:
        m = targets.shape[1]
        where = positions(self.grid, self.width, device=z.device).to(z.dtype)  # [n, width]
        seen = self.enter(z) + where[context]
        asked = self.mask_token.to(z.dtype) + where[targets]  # [b, m, q, width]
        x = torch.cat(
            [repeat(seen, "b k w -> (b m) k w", m=m), rearrange(asked, "b m q w -> (b m) q w")],
            dim=1,
        )
        for block in self.blocks:
            x = block(x)
        told = self.leave(self.norm(x[:, -targets.shape[2] :]))
        return rearrange(told, "(b m) q d -> b m q d", m=m)


def build_encoder(config: IJEPAConfig) -> VisionTransformer:
    """A vision transformer without a class token, over images or clips."""
    assert config.channels is not None and config.size is not None
    return VisionTransformer(
        config.size, config.patch, config.channels, config.dim, config.depth, config.heads
    )


class IJEPA(nn.Module):
    """Encoder, predictor, and an average of the encoder if the target is one.

    Args:
        averaged: keep an average of the encoder for the targets.
    """

    def __init__(self, config: IJEPAConfig, averaged: bool = True) -> None:
        super().__init__()
        if config.channels is None or config.size is None:
            raise ValueError("model.channels and size must be known")
        self.encoder = build_encoder(config)
        self.average = build_encoder(config).requires_grad_(False) if averaged else None
        self.predictor = MaskPredictor(
            config.dim,
            config.predictor_dim,
            config.predictor_depth,
            config.predictor_heads,
            self.encoder.grid,
        )

    def forward(
        self,
        images: Float[Tensor, "b c *size"],
        masks: Sequence[tuple[Int[Tensor, "b k"], Int[Tensor, "b m q"]]],
    ) -> Latents:
        """The context's mean latent under each (context, targets), and what it tells of targets."""
        s = self.whole(images)
        found = [self.tell(images, s, context, targets) for context, targets in masks]
        return Latents(
            torch.cat([part.z for part in found], dim=1),
            torch.cat([part.predicted for part in found], dim=1),
            torch.cat([part.target for part in found], dim=1),
        )

    def whole(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b n d"]:
        """s: the targets of all patches."""
        s = (self.encoder if self.average is None else self.average)(images)
        return F.layer_norm(s, s.shape[-1:])

    def tell(
        self,
        images: Float[Tensor, "b c *size"],
        s: Float[Tensor, "b n d"],
        context: Int[Tensor, "b k"],
        targets: Int[Tensor, "b m q"],
    ) -> Latents:
        """Under one mask, for targets s that are known.

        Returns:
            z [b, 1, d], the mean latent of the context: patches of an image differ by their places
            alone, so that a spread over them would forbid no collapse.
        """
        z = self.encoder(images, context)
        told = self.predictor(z, context, targets).flatten(1, 2)
        return Latents(z.mean(dim=1, keepdim=True), told, take(s, targets.flatten(1)))

    def embed(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d"]:
        """Mean over all patches, of the average if there is one: what a probe reads."""
        return (self.encoder if self.average is None else self.average)(images).mean(dim=1)
