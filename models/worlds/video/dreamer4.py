"""Dreamer 4's dynamics: frames told clean from any noise, in steps of any size, beside a cache.

Training Agents Inside of Scalable World Models, 2025, arXiv:2509.24527. A frame is a row of tokens
in a transformer that has no conditions, but tokens for what it is told:

    action     a_{t-1} and a base, or the base alone where no action is known
    signal     tau_t and d_t: how clean the frame is, and how far the next step goes
    places     tokens of z_t, noise and frame mixed; what comes out of them is the frame, clean
    registers  for the model's own use

trained by shortcut forcing (shortcut.py), with tau and d of each frame by itself. A frame is drawn
in `steps` steps of 1 / steps. Those of the past are shown a little noisy, `context_noise` of noise
drawn once for each, and say so.

What comes out may be v = x_1 - x_0 instead, for the ablation in the paper.
The tokens of z are the latents of a tokenizer (masked_tokenizer.py), which has learned before, or,
without one, patches of pixels. What differs: one kind of action, and latents are not packed. The
paper's tau_ctx = 0.1 is read as a tenth of noise, which "slightly corrupted" says too.

Dimensions: b films, t frames, s tokens of a frame, p numbers of each, d width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from models.worlds.initialise import init_uniform, init_zero
from models.worlds.video.actions import ActionTable
from models.worlds.video.config import Dreamer4Config, Objective
from models.worlds.video.film_transformer import FilmCache, FilmTransformer
from models.worlds.video.film_world import (
    DRAWN,
    SHOWN,
    FilmWorld,
    Memory,
    patches_of,
    pictures_of,
    widened,
)
from models.worlds.video.masked_tokenizer import MaskedTokenizer
from models.worlds.video.noise import normal
from models.worlds.video.shortcut import between, powers, spread, travel

TOLD = 2  # tokens of what a frame is told: action and signal


class Dreamer4(FilmWorld[FilmCache]):
    """Tells clean frames, and draws the next ones."""

    config: Dreamer4Config

    def __init__(self, config: Dreamer4Config) -> None:
        super().__init__(config)
        d, places = config.transformer.dim, (self.size // config.patch) ** 2
        numbers = self.channels * config.patch**2
        self.most, self.tokenizer = config.most, None
        if config.tokenizer.latents:
            self.tokenizer = MaskedTokenizer(config.tokenizer, places, numbers)
            places, numbers = config.tokenizer.latents, config.tokenizer.channels
        self.places, self.numbers = places, numbers
        self.enter = nn.Linear(numbers if self.tokenizer else self.seen, d)
        self.place = nn.Parameter(torch.empty(TOLD + places + config.registers, d))
        self.action = ActionTable(self.parts, d, none=True)  # the last is no action: the base alone
        self.signal = nn.Embedding(config.most + 1, d // 2)
        self.stride = nn.Embedding(len(powers(config.most)), d - d // 2)
        self.transformer = FilmTransformer(config.transformer, conditioned=False)
        self.norm = nn.RMSNorm(d)
        self.leave = nn.Linear(d, numbers)

    def init_own(self, generator: torch.Generator | None) -> None:
        self.place.normal_(0.0, 0.02, generator=generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random weights; what is told is 0 at first."""
        init_uniform(self, generator)
        for table in (self.action, self.signal, self.stride):
            table.weight.normal_(generator=generator)
        self.action.weight[-1] = 0.0
        init_zero(self.leave)

    def cut(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t s p"]:
        """Patches of frames in [0, 1], in [-1, 1]."""
        return patches_of(frames, self.config.patch) * 2 - 1

    def prepare(
        self, frames: Float[Tensor, "b t c h w"], masked: Bool[Tensor, "b t s"]
    ) -> Float[Tensor, ""]:
        """The tokenizer's error on frames of which it does not see some patches."""
        assert self.tokenizer is not None
        x = self.cut(frames)
        return F.mse_loss(self.tokenizer.decode(self.tokenizer.encode(x, masked)), x)

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t s p"]:
        x = self.cut(frames)
        return x if self.tokenizer is None else self.tokenizer.encode(x)

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "b t s p"]) -> Float[Tensor, "b t c h w"]:
        x = z if self.tokenizer is None else self.tokenizer.decode(z).clamp(-1, 1)
        return (pictures_of(x, self.config.patch) + 1) / 2

    def noise(self, memory: Memory[Any]) -> Float[Tensor, "b 1 s p"]:
        shape = self.places, self.numbers
        return normal(memory.seed, memory.episodes, (memory.count, DRAWN), shape)[:, None]

    def noise_shown(self, memory: Memory[Any], frames: int) -> Float[Tensor, "b t s p"]:
        count = memory.count + torch.arange(frames, device=memory.episodes.device)
        shape = self.places, self.numbers
        return normal(memory.seed, memory.episodes[:, None], (count, SHOWN), shape)

    def forward(
        self,
        z: Float[Tensor, "b t s p"],
        tau: Int64[Tensor, "b t"],
        stride: Int64[Tensor, "b t"],
        before: Int64[Tensor, "b t"],
        cache: FilmCache | None = None,
    ) -> tuple[Float[Tensor, "b t s p"], FilmCache]:
        """The clean frames that are told of noisy ones, and the cache with them.

        Args:
            tau, stride: in smallest steps, 1 / config.most.
            before: the action before each frame; `actions` where none is known.
        """
        size = stride.float().log2().round().long()  # its index: 0, 1, 2, ..
        signal = torch.cat([self.signal(tau), self.stride(size)], dim=-1)
        told = torch.stack([self.action(before), signal], dim=2)
        seen = z if self.tokenizer else widened(z, self.config.patch, self.config.margin)
        x = torch.cat([told, self.enter(seen)], dim=2)
        x = F.pad(x, (0, 0, 0, self.config.registers)) + self.place
        x, kept = self.transformer(x, None, cache)
        out = self.leave(self.norm(x[:, :, TOLD : TOLD + self.places]))
        if self.config.objective == Objective.v:
            out = z + (1 - spread(tau, z) / self.most) * out
        return out, kept

    def show(
        self,
        z: Float[Tensor, "b t s p"],
        before: Int64[Tensor, "b t"],
        noise: Float[Tensor, "b t s p"] | None,
        cache: FilmCache | None,
    ) -> FilmCache:
        """A little noisy, at the nearest level; clean ones are told as the last one trained."""
        assert noise is not None
        level = round((1 - self.config.context_noise) * self.most)
        tau = torch.full(z.shape[:2], level, device=z.device)
        shown = between(noise, z, tau, self.most)
        told = tau.clamp(max=self.most - 1)
        return self(shown, told, torch.ones_like(tau), before, cache)[1]

    def draw(
        self, noise: Float[Tensor, "b 1 s p"], before: Int64[Tensor, "b 1"], cache: FilmCache
    ) -> Float[Tensor, "b 1 s p"]:
        def tell(z: Tensor, tau: Tensor, stride: Tensor) -> Tensor:
            return self(z, tau, stride, before, cache)[0]

        return travel(tell, noise, self.config.steps, self.most).clamp(-1, 1)
