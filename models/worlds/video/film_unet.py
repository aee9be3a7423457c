"""A U-Net over films: convolutions within a frame, attention over frames at each place.

The causal U-Net of Diffusion Forcing (2024, arXiv:2407.01392), which is that of video diffusion
(2022, arXiv:2204.03458) with a mask: residual blocks (unet.py) on each frame, told the condition of
that frame, and after every level, down and up, and after the bottom, at each place,

    x = x + attention over time(rmsnorm(x))           causal, in a window (film_transformer.py)

A convolution does the same everywhere: what moves one way is learned once, not place by place.

What differs: no attention over space but at the bottom, where the published one has a linear one at
every level; and heads of 16.

Dimensions: b films, t frames, c channels, h and w their height and width, e width of the condition.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.initialise import init_zero
from models.worlds.video.config import (
    HEAD_OVER_TIME,
    DiffusionForcingConfig,
    FilmTransformerConfig,
)
from models.worlds.video.film_transformer import FilmCache, TimeAttention, check_beside
from models.worlds.video.unet import AdaptiveNorm, Residual, SelfAttention, UNet


class OverTime(nn.Module):
    """At each place, every frame sees those before it."""

    def __init__(self, channels: int, config: FilmTransformerConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels)
        self.attention = TimeAttention(
            replace(config, dim=channels, heads=channels // HEAD_OVER_TIME)
        )

    def forward(
        self, x: Float[Tensor, "bt c h w"], b: int, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "bt c h w"], tuple[Tensor, Tensor]]:
        places = rearrange(x, "(b t) c h w -> b t (h w) c", b=b)
        mixed, kept = self.attention(self.norm(places), past)
        return x + rearrange(mixed, "b t (h w) c -> (b t) c h w", h=x.shape[-2]), kept


class FilmUNet(nn.Module):
    """Tells the pixels of films, gathered into squares of `config.patch` first.

    Args:
        channels: of a pixel.
    """

    def __init__(self, config: DiffusionForcingConfig, channels: int) -> None:
        super().__init__()
        self.patch, channels = config.patch, channels * config.patch**2
        wide, e = config.widths[0], config.transformer.dim
        self.enter = nn.Conv2d(channels, wide, 3, padding=1)
        self.unet = UNet(config.widths, config.depth, e, attends=True, all_again=False)
        self.over_time = nn.ModuleList(
            OverTime(width, config.transformer) for width in self.unet.given
        )
        self.norm = AdaptiveNorm(wide, e)
        self.leave = nn.Conv2d(wide, channels, 3, padding=1)

    def silence(self) -> None:
        """Every block does nothing at first, and what is told is 0."""
        parts = list(self.modules())
        init_zero(self.leave)
        init_zero(*(part.second for part in parts if isinstance(part, Residual)))
        init_zero(*(part.out for part in parts if isinstance(part, SelfAttention | TimeAttention)))

    def forward(
        self,
        x: Float[Tensor, "b t c h w"],
        c: Float[Tensor, "b t e"],
        cache: FilmCache | None = None,
    ) -> tuple[Float[Tensor, "b t c h w"], FilmCache]:
        """What is told of frames that follow those in the cache, and the cache with them.

        Raises:
            ValueError: more than one frame beside a cache.
        """
        check_beside(x, cache)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def over_time(y: Tensor) -> Tensor:
            at = len(keys)
            past = None if cache is None else (cache.keys[at], cache.values[at])
            y, kept = self.over_time[at](y, len(x), past)
            keys.append(kept[0])
            values.append(kept[1])
            return y

        e = c.flatten(0, 1)
        y = F.pixel_unshuffle(x.flatten(0, 1), self.patch)
        y = self.enter(y.contiguous(memory_format=torch.channels_last))
        y = self.unet(y, e, over_time)
        y = F.pixel_shuffle(self.leave(F.silu(self.norm(y, e))), self.patch)
        return y.unflatten(0, x.shape[:2]), FilmCache(tuple(keys), tuple(values))
