"""Diffusion Forcing: films whose frames are each as noisy as they like.

Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion, 2024, arXiv:2407.01392, on
the causal transformer of Oasis (2024). Frames are cut into patches; every frame has a noise level
of its own, and a causal transformer tells all of them at once:

    k_t        ~ uniform over 0 .. 999, of each frame by itself
    c_t        = MLP(sines of k_t) + embedding of a_{t-1}, what was done before frame t
    v          = transformer(patches of x_k, c)
    loss       = weight(k) (v - v_k)^2                                            (schedules.py)

A frame is drawn beside the clean ones, in `steps` steps of DDIM, from noise that is drawn once.
Those that are past are told as if they were a little noisy (`stabilise`), so that small mistakes
are taken for noise; they lie in a cache, and each step computes the new frame alone.

What differs: patches of pixels in the place of a VAE's latents, and the published 3D U-Net is the
transformer that Oasis has.

Dimensions: b films, t frames, c channels, s patches of a frame, d width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.worlds.initialise import init_uniform
from models.worlds.video.config import DiffusionForcingConfig
from models.worlds.video.film_transformer import FilmCache, FilmTransformer
from models.worlds.video.noise import normal
from models.worlds.video.outcome import Outcome
from models.worlds.video.schedules import (
    LEVELS,
    ddim_levels,
    noised,
    signal,
    told_apart,
    with_clean,
)
from models.worlds.video.world import check_actions, check_seen

LARGEST = 6.0  # of noise


@dataclass(frozen=True)
class Memory:
    """What a dream goes on from."""

    cache: FilmCache
    episodes: Int64[Tensor, " b"]
    seed: int
    count: int  # frames drawn so far
    of: int  # the model's identity: a cache is of no other


class DiffusionForcing(nn.Module):
    """Tells the velocities of noisy films, and draws their next frames."""

    def __init__(self, config: DiffusionForcingConfig) -> None:
        super().__init__()
        if config.channels is None or config.actions is None or config.image_size is None:
            raise ValueError("model.channels, model.image_size and model.actions must be known")
        self.config, self.context = config, config.context
        d, side = config.transformer.dim, config.image_size // config.patch
        pixels = config.channels * config.patch**2
        self.enter = nn.Linear(pixels, d)
        self.place = nn.Parameter(torch.empty(side * side, d))
        self.level = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.action = nn.Embedding(config.actions + 1, d)  # the last: none is known
        self.transformer = FilmTransformer(config.transformer)
        self.modulation = nn.Linear(d, 2 * d)
        self.leave = nn.Linear(d, pixels)
        self.outcomes = Outcome(
            config.channels, config.actions, config.image_size, config.outcome_width
        )

    def init_own(self, generator: torch.Generator | None) -> None:
        self.place.normal_(0.0, 0.02, generator=generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random weights; every block does nothing at first, and v is 0."""
        init_uniform(self, generator)
        self.transformer.silence()
        for part in (self.modulation, self.leave):
            for parameter in part.parameters():
                parameter.zero_()

    @property
    def abar(self) -> Float[Tensor, " k1"]:
        """Of levels 0 .. LEVELS - 1, and of -1."""
        return with_clean(signal(self.config.schedule)).to(self.place)

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
        config, p = self.config, self.config.patch
        c = self.level(sines(level, config.transformer.dim)) + self.action(before)
        tokens = rearrange(x, "b t c (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        tokens, kept = self.transformer(self.enter(tokens) + self.place, c, cache)
        scale, shift = self.modulation(F.silu(c))[:, :, None].chunk(2, dim=-1)
        tokens = self.leave(F.rms_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift)
        v = rearrange(
            tokens, "b t (h w) (c p q) -> b t c (h p) (w q)", h=x.shape[-2] // p, p=p, q=p
        )
        return v, kept

    def outcome(
        self,
        before: Float[Tensor, "b 2 c h w"],
        action: Int64[Tensor, " b"],
        after: Float[Tensor, "b c h w"],
    ) -> tuple[Float[Tensor, "b 3"], Float[Tensor, "b 2"]]:
        """Logits of the sign of the reward (-1, 0, 1), and of going on or ending; of two frames in
        [0, 1], what was done then, and the frame that followed."""
        return self.outcomes(before * 2 - 1, action, after * 2 - 1)

    def seen(
        self,
        frames: Float[Tensor, "b t c h w"],
        before: Int64[Tensor, "b t"],
        cache: FilmCache | None = None,
    ) -> FilmCache:
        """The cache with clean frames in [-1, 1], told as if they were a little noisy."""
        label = self.config.stabilise - 1
        level = torch.full(frames.shape[:2], label, device=frames.device)
        shown = frames * self.abar[label].sqrt() if self.config.fade_context else frames
        return self(shown, level, before, cache)[1]

    @torch.no_grad()
    def init_cache(
        self,
        frames: Float[Tensor, "b t c h w"],
        actions: Int64[Tensor, "b t-1"],
        episodes: Int64[Tensor, " b"],
        seed: int = 0,
    ) -> Memory:
        """What is known of some frames in [0, 1]."""
        config = self.config
        assert config.channels is not None and config.image_size is not None
        assert config.actions is not None
        check_seen(frames, actions, self.context, config.channels, config.image_size)
        check_actions(actions, config.actions)
        before = F.pad(actions, (1, 0), value=config.actions)
        return Memory(self.seen(frames * 2 - 1, before), episodes, seed, 0, id(self))

    @torch.no_grad()
    def step(
        self, cache: Memory, action: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b c h w"], Memory]:
        """The next frame in [0, 1], drawn in `config.steps` steps and one more to be seen."""
        config = self.config
        assert config.channels is not None and config.image_size is not None
        assert config.actions is not None
        if cache.of != id(self):
            raise ValueError("this is the cache of another model: call init_cache of this one")
        check_actions(action, config.actions)
        shape = config.channels, config.image_size, config.image_size
        x = normal(cache.seed, cache.episodes, (cache.count,), shape)[:, None]
        x, before, abar = x.clamp(-LARGEST, LARGEST), action[:, None], self.abar
        levels = ddim_levels(config.steps)
        for now, then in pairwise(levels):
            level = torch.full((len(x), 1), now, device=x.device)
            v, _ = self(x, level, before, cache.cache)
            clean, eps = told_apart(x, v, abar[now])
            x = noised(clean.clamp(-1, 1), eps, abar[then])
        kept = self.seen(x, before, cache.cache)
        return (x[:, 0] + 1) / 2, replace(cache, cache=kept, count=cache.count + 1)


def sines(level: Int64[Tensor, "b t"], d: int) -> Float[Tensor, "b t d"]:
    """Sines and cosines of a level, from one turn of all levels to many."""
    half = d // 2
    speed = torch.exp(-math.log(10_000) * torch.arange(half, device=level.device) / half)
    angle = level[..., None].float() * speed * (1000 / LEVELS)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
