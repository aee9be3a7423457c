"""Diffusion Forcing: films whose frames are each as noisy as they like.

Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion, 2024, arXiv:2407.01392.
Every frame has a noise level of its own, and a causal network tells all of them at once: the U-Net
of Diffusion Forcing (`model.widths`), or the transformer of Oasis (2024), over patches.

    k_t        ~ uniform over 0 .. 999, of each frame by itself
    c_t        = MLP(sines of k_t) + embedding of a_{t-1}, what was done before frame t
    v          = network(x_k, c)
    loss       = weight(k) (v - v_k)^2                                            (schedules.py)

A frame is drawn beside the clean ones, in `steps` steps of DDIM, from noise that is drawn once.
Those that are past are told as if they were a little noisy (`stabilise`), so that small mistakes
are taken for noise; they lie in a cache, and each step computes the new frame alone. History
guidance (2025, arXiv:2502.06764), in its plainest form, goes on from what is told without a past.

What differs: pixels in the place of a VAE's latents.

Dimensions: b films, t frames, c channels, s patches of a frame, d width.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.worlds.initialise import init_uniform, init_zero
from models.worlds.video.actions import ActionTable
from models.worlds.video.config import DiffusionForcingConfig, Objective
from models.worlds.video.film_transformer import FilmCache, FilmTransformer
from models.worlds.video.film_unet import FilmUNet
from models.worlds.video.film_world import (
    DRAWN,
    FilmWorld,
    Memory,
    patches_of,
    pictures_of,
)
from models.worlds.video.noise import normal
from models.worlds.video.schedules import (
    LEVELS,
    ddim_levels,
    noised,
    signal,
    told_apart,
    velocity_of,
    with_clean,
)

LARGEST = 6.0  # of noise


class PatchTransformer(nn.Module):
    """Tells the pixels of films, cut into patches, each with what is around it.

    Args:
        channels: of a pixel.
        size: height and width of a frame.
    """

    def __init__(self, config: DiffusionForcingConfig, channels: int, size: int) -> None:
        super().__init__()
        self.patch, self.margin, d = config.patch, config.margin, config.transformer.dim
        self.enter = nn.Linear(channels * (self.patch + 2 * self.margin) ** 2, d)
        self.place = nn.Parameter(torch.empty((size // self.patch) ** 2, d))
        self.transformer = FilmTransformer(config.transformer)
        self.modulation = nn.Linear(d, 2 * d)
        self.leave = nn.Linear(d, channels * self.patch**2)

    def init_own(self, generator: torch.Generator | None) -> None:
        self.place.normal_(0.0, 0.02, generator=generator)

    def silence(self) -> None:
        """Every block does nothing at first, and what is told is 0."""
        self.transformer.silence()
        init_zero(self.modulation, self.leave)

    def forward(
        self,
        x: Float[Tensor, "b t c h w"],
        c: Float[Tensor, "b t d"],
        cache: FilmCache | None = None,
    ) -> tuple[Float[Tensor, "b t c h w"], FilmCache]:
        """What is told of frames that follow those in the cache, and the cache with them."""
        tokens = self.enter(patches_of(x, self.patch, self.margin)) + self.place
        tokens, kept = self.transformer(tokens, c, cache)
        scale, shift = self.modulation(F.silu(c))[:, :, None].chunk(2, dim=-1)
        tokens = F.rms_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift
        return pictures_of(self.leave(tokens), self.patch), kept


class DiffusionForcing(FilmWorld[FilmCache]):
    """Tells the velocities of noisy films, and draws their next frames."""

    config: DiffusionForcingConfig

    def __init__(self, config: DiffusionForcingConfig) -> None:
        super().__init__(config)
        d = config.transformer.dim
        # Of levels 0 .. LEVELS - 1, and of -1.
        self.abar = nn.Buffer(with_clean(signal(config.schedule)).float())
        self.level = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.action = ActionTable(self.parts, d, none=True)  # the last: none is known
        self.network: FilmUNet | PatchTransformer
        if config.widths:
            self.network = FilmUNet(config, self.channels)
        else:
            self.network = PatchTransformer(config, self.channels, self.size)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random weights; every block does nothing at first, and what is told is 0."""
        init_uniform(self, generator)
        self.abar.copy_(with_clean(signal(self.config.schedule)))
        self.network.silence()

    def forward(
        self,
        x: Float[Tensor, "b t c h w"],
        level: Int64[Tensor, "b t"],
        before: Int64[Tensor, "b t"],
        cache: FilmCache | None = None,
    ) -> tuple[Float[Tensor, "b t c h w"], FilmCache]:
        """v of noisy frames, and the cache with them.

        Args:
            before: the action before each frame; `config.actions` where none is known.
        """
        config = self.config
        c = self.level(sines(level, config.transformer.dim)) + self.action(before)
        told, kept = self.network(x, c, cache)
        if config.objective == Objective.v:
            return told, kept
        return velocity_of(x, told, self.abar[level][..., None, None, None]), kept

    def show(
        self,
        z: Float[Tensor, "b t c h w"],
        before: Int64[Tensor, "b t"],
        noise: Tensor | None,
        cache: FilmCache | None,
    ) -> FilmCache:
        """Told as if they were a little noisy; none is added."""
        return self(*self.as_past(z), before, cache)[1]

    def as_past(
        self, z: Float[Tensor, "b t c h w"]
    ) -> tuple[Float[Tensor, "b t c h w"], Int64[Tensor, "b t"]]:
        """Clean frames as those of the past are shown, and the level that is told of them."""
        label = self.config.stabilise - 1
        shown = z * self.abar[label].sqrt() if self.config.fade_context else z
        return shown, torch.full(z.shape[:2], label, device=z.device)

    def noise(self, memory: Memory[Any]) -> Float[Tensor, "b n c h w"]:
        """What the next frame is drawn from; if it is `fresh`, in every step."""
        first = super().noise(memory)
        if not self.config.fresh:
            return first
        steps = torch.arange(1, self.config.steps, device=first.device)
        counters, shape = (memory.count, DRAWN, steps), first.shape[2:]
        return torch.cat([first, normal(memory.seed, memory.episodes[:, None], counters, shape)], 1)

    def draw(
        self, noise: Float[Tensor, "b n c h w"], before: Int64[Tensor, "b 1"], cache: FilmCache
    ) -> Float[Tensor, "b 1 c h w"]:
        noise, abar = noise.clamp(-LARGEST, LARGEST), self.abar
        x = noise[:, :1]
        for step, (now, then) in enumerate(pairwise(ddim_levels(self.config.steps))):
            v = self.guided(x, torch.full_like(before, now), before, cache)
            clean, eps = told_apart(x, v, abar[now])
            if self.config.fresh and then >= 0:
                eps = noise[:, step + 1, None]
            x = noised(clean.clamp(-1, 1), eps, abar[then])
        return x.clamp(-1, 1)

    def guided(
        self, x: Tensor, level: Tensor, before: Tensor, cache: FilmCache
    ) -> Float[Tensor, "b 1 c h w"]:
        """v, further from what is told without a past than it is by itself, if `guidance` > 1."""
        v, _ = self(x, level, before, cache)
        if self.config.guidance == 1:
            return v
        alone, _ = self(x, level, torch.full_like(before, self.actions))
        return alone + self.config.guidance * (v - alone)


def sines(level: Int64[Tensor, "b t"], d: int) -> Float[Tensor, "b t d"]:
    """Sines and cosines of a level, from one turn of all levels to many."""
    half = d // 2
    speed = torch.exp(-math.log(10_000) * torch.arange(half, device=level.device) / half)
    angle = level[..., None].float() * speed * (1000 / LEVELS)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
