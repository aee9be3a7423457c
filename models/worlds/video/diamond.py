"""DIAMOND: the next frame, drawn by diffusion beside the frames before it.

Diffusion for World Modeling: Visual Details Matter in Atari, 2024, arXiv:2405.12399. Frames are
pixels in [-1, 1]; nothing but the last `context` of them is remembered:

    sigma      = exp(normal(mean, spread)), at most 20
    noisy      = x_n + sigma_offset m + sigma n
    F          = U-Net(concat(x_{n-context} .. x_{n-1} / sigma_data, c_in noisy), condition)
    condition  = MLP(Fourier(c_noise) + embeddings of a_{n-context} .. a_{n-1})
    loss       = (F - (x_n - c_skip noisy) / c_out)^2
    D          = c_skip noisy + c_out F, cut to [-1, 1] and rounded to 8 bits

Action a_i is what was done after frame i, and leads to frame i + 1. A frame is drawn by Euler steps
along the noise levels of EDM (edm.py). What a step is worth is told by a network of its own
(outcome.py).

What differs from the published code, each a key of its own: noise begins at sigma_max and not at 1
(`unit_start`), 8 bits are reached by rounding and not by cutting off, and the context may be noisy
in training (`context_noise` of the recipe, as in GameNGen, 2024, arXiv:2408.14837).

Dimensions: b clips, t frames, c channels, h and w height and width, e width of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.worlds.initialise import init_uniform, init_zero
from models.worlds.video.actions import ActionTable
from models.worlds.video.config import DiamondConfig
from models.worlds.video.edm import karras_grid, precondition
from models.worlds.video.noise import normal
from models.worlds.video.outcome import DrawnWorld
from models.worlds.video.unet import Residual, SelfAttention, UNet, groups_of
from models.worlds.video.world import check_actions, check_seen

LOUDEST = 20.0  # noise in training
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Context:
    """The frames that are remembered, in [-1, 1], and the actions between them."""

    frames: Float[Tensor, "b n c h w"]
    actions: Int64[Tensor, "b n-1"]
    episodes: Int64[Tensor, " b"]
    seed: int
    count: int  # frames drawn so far


class Diamond(DrawnWorld):
    """The denoiser, and the world that it makes."""

    config: DiamondConfig

    def __init__(self, config: DiamondConfig) -> None:
        super().__init__(config)
        wide, e = config.widths[0], config.condition
        self.frequencies = nn.Buffer(torch.empty(e // 2))
        self.action = ActionTable(self.parts, e // config.context)
        self.condition = nn.Sequential(nn.Linear(e, e), nn.SiLU(), nn.Linear(e, e))
        pixels = self.channels * config.patch**2
        self.enter = nn.Conv2d((config.context + 1) * pixels, wide, 3, padding=1)
        self.unet = UNet(config.widths, config.depth, e, config.attention)
        self.norm = nn.GroupNorm(groups_of(wide), wide)
        self.leave = nn.Conv2d(wide, pixels, 3, padding=1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random weights; every residual branch, and F, is zero at first: D = c_skip noisy."""
        init_uniform(self, generator)
        self.frequencies.normal_(generator=generator)
        self.action.weight.normal_(generator=generator)
        self.outcomes.action.weight.normal_(generator=generator)
        init_zero(self.leave)
        init_zero(*(part.second for part in self.modules() if isinstance(part, Residual)))
        init_zero(*(part.out for part in self.modules() if isinstance(part, SelfAttention)))

    def forward(
        self,
        noisy: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        seen: Float[Tensor, "b n c h w"],
        actions: Int64[Tensor, "b n"],
    ) -> Float[Tensor, "b c h w"]:
        """F, what the network says of a noisy frame."""
        config = self.config
        scales = precondition(sigma, config.sigma_data, config.sigma_offset)
        phase = 2 * math.pi * scales.noise[:, None] * self.frequencies
        told = torch.cat([phase.cos(), phase.sin()], dim=1) + self.action(actions).flatten(1)
        into = [seen.flatten(1, 2) / config.sigma_data, scales.into[:, None, None, None] * noisy]
        x = F.pixel_unshuffle(torch.cat(into, dim=1), config.patch)
        x = self.enter(x.contiguous(memory_format=torch.channels_last))
        x = self.unet(x, self.condition(told))
        return F.pixel_shuffle(self.leave(F.silu(self.norm(x))), config.patch)

    def denoise(
        self,
        noisy: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        seen: Float[Tensor, "b n c h w"],
        actions: Int64[Tensor, "b n"],
    ) -> Float[Tensor, "b c h w"]:
        """D, the clean frame, as it will be seen again."""
        scales = precondition(sigma, self.config.sigma_data, self.config.sigma_offset)
        skip, out = (x[:, None, None, None] for x in (scales.skip, scales.out))
        return quantise(skip * noisy + out * self(noisy, sigma, seen, actions))

    def loss(
        self,
        frame: Float[Tensor, "b c h w"],
        seen: Float[Tensor, "b n c h w"],
        actions: Int64[Tensor, "b n"],
        draw: Draw,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b c h w"]]:
        """The error of a frame in [-1, 1], and the frame that was told, without a gradient.

        Args:
            draw: gives normal numbers [b, *shape], others for each number of a use.
        """
        config = self.config
        sigma = (config.sigma_mean + config.sigma_spread * draw(0)).exp()
        sigma = sigma.clamp(config.sigma_min, LOUDEST)
        noisy = frame + config.sigma_offset * draw(1, len(frame[0]), 1, 1)
        noisy = noisy + sigma[:, None, None, None] * draw(2, *frame.shape[1:])
        scales = precondition(sigma, config.sigma_data, config.sigma_offset)
        skip, out = (x[:, None, None, None] for x in (scales.skip, scales.out))
        told = self(noisy, sigma, seen, actions)
        loss = (told - (frame - skip * noisy) / out).float().square().mean()
        return loss, quantise(skip * noisy + out * told).detach()

    def init_cache(
        self,
        frames: Float[Tensor, "b t c h w"],
        actions: Int64[Tensor, "b t-1"],
        episodes: Int64[Tensor, " b"],
        seed: int = 0,
    ) -> Context:
        """The last `context` of some frames in [0, 1]."""
        n = self.context
        check_seen(frames, actions, n, self.channels, self.size)
        check_actions(actions, self.actions)
        kept = actions[:, frames.shape[1] - n :]
        return Context(frames[:, -n:] * 2 - 1, kept, episodes, seed, 0)

    @torch.no_grad()
    def step(
        self, cache: Context, action: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b c h w"], Context]:
        """The next frame in [0, 1], drawn in `config.steps` steps."""
        check_actions(action, self.actions)
        actions = torch.cat([cache.actions, action[:, None]], dim=1)
        noise = normal(cache.seed, cache.episodes, (cache.count,), cache.frames.shape[2:])
        x = self.run(self.draw, noise, cache.frames, actions)
        frames = torch.cat([cache.frames, x[:, None]], dim=1)[:, 1:]
        cache = replace(cache, frames=frames, actions=actions[:, 1:], count=cache.count + 1)
        return (x + 1) / 2, cache

    def draw(
        self,
        noise: Float[Tensor, "b c h w"],
        seen: Float[Tensor, "b n c h w"],
        actions: Int64[Tensor, "b n"],
    ) -> Float[Tensor, "b c h w"]:
        """A frame in [-1, 1], after those that were seen."""
        config = self.config
        grid = karras_grid(config.steps, config.sigma_min, config.sigma_max, config.rho).tolist()
        x = noise * (1.0 if config.unit_start else grid[0])
        for now, then in pairwise(grid):
            sigma = torch.full((len(x),), now, device=x.device)
            clean = self.denoise(x, sigma, seen, actions)
            x = clean + (x - clean) * (then / now)
        return x


def quantise(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Cut to [-1, 1] and rounded to the 256 values that a stored pixel can have."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
