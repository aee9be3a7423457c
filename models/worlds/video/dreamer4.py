"""Dreamer 4's dynamics: frames told clean from any noise, in steps of any size, beside a cache.

Training Agents Inside of Scalable World Models, 2025, arXiv:2509.24527. A frame is a row of tokens
in a transformer that has no conditions, but tokens for what it is told:

    action     a_{t-1} and a base, or the base alone where no action is known
    signal     tau_t and d_t: how clean the frame is, and how far the next step goes
    places     patches of z_t, noise and frame mixed; what comes out of them is the frame, clean
    registers  for the model's own use

trained by shortcut forcing (shortcut.py), with tau and d of each frame by itself. A frame is drawn
in `steps` steps of 1 / steps. Those of the past are shown a little noisy, `context_noise` of noise
drawn once for each, and say so.

What differs: patches of pixels in the place of the latents of a tokenizer, and one kind of action.
The paper's tau_ctx = 0.1 is read as a tenth of noise, which "slightly corrupted" says too.

Dimensions: b films, t frames, c channels, s patches of a frame, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.worlds.initialise import init_uniform
from models.worlds.video.config import Dreamer4Config
from models.worlds.video.film_transformer import FilmCache, FilmTransformer
from models.worlds.video.film_world import FilmWorld
from models.worlds.video.shortcut import between, powers, travel

TOLD = 2  # tokens of what a frame is told: action and signal


class Dreamer4(FilmWorld):
    """Tells clean frames, and draws the next ones."""

    config: Dreamer4Config

    def __init__(self, config: Dreamer4Config) -> None:
        super().__init__(config)
        d, places = config.transformer.dim, (self.size // config.patch) ** 2
        pixels = self.channels * config.patch**2
        self.places, self.most = places, config.most
        self.enter = nn.Linear(pixels, d)
        self.place = nn.Parameter(torch.empty(TOLD + places + config.registers, d))
        self.action = nn.Embedding(self.actions + 1, d)  # the last is no action: the base alone
        self.signal = nn.Embedding(config.most + 1, d // 2)
        self.stride = nn.Embedding(len(powers(config.most)), d - d // 2)
        self.transformer = FilmTransformer(config.transformer, conditioned=False)
        self.norm = nn.RMSNorm(d)
        self.leave = nn.Linear(d, pixels)

    def init_own(self, generator: torch.Generator | None) -> None:
        self.place.normal_(0.0, 0.02, generator=generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random weights; what is told is 0 at first."""
        init_uniform(self, generator)
        for table in (self.action, self.signal, self.stride):
            table.weight.normal_(generator=generator)
        self.action.weight[-1] = 0.0
        for parameter in self.leave.parameters():
            parameter.zero_()

    def forward(
        self,
        z: Float[Tensor, "b t c h w"],
        tau: Int64[Tensor, "b t"],
        stride: Int64[Tensor, "b t"],
        before: Int64[Tensor, "b t"],
        cache: FilmCache | None = None,
    ) -> tuple[Float[Tensor, "b t c h w"], FilmCache]:
        """The clean frames that are told of noisy ones, and the cache with them.

        Args:
            tau, stride: in smallest steps, 1 / config.most.
            before: the action before each frame; `actions` where none is known.
        """
        p, registers = self.config.patch, self.config.registers
        patches = rearrange(z, "b t c (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        size = stride.float().log2().round().long()  # its index: 0, 1, 2, ..
        signal = torch.cat([self.signal(tau), self.stride(size)], dim=-1)
        told = torch.stack([self.action(before), signal], dim=2)
        x = F.pad(torch.cat([told, self.enter(patches)], dim=2), (0, 0, 0, registers))
        x, kept = self.transformer(x + self.place, None, cache)
        out = self.leave(self.norm(x[:, :, TOLD : TOLD + self.places]))
        frames = rearrange(
            out, "b t (h w) (c p q) -> b t c (h p) (w q)", h=z.shape[-2] // p, p=p, q=p
        )
        return frames, kept

    def show(
        self,
        z: Float[Tensor, "b t c h w"],
        before: Int64[Tensor, "b t"],
        noise: Float[Tensor, "b t c h w"],
        cache: FilmCache | None,
    ) -> FilmCache:
        """A little noisy, at the nearest level; clean ones are told as the last one trained."""
        level = round((1 - self.config.context_noise) * self.most)
        tau = torch.full(z.shape[:2], level, device=z.device)
        shown = between(noise, z, tau, self.most)
        told = tau.clamp(max=self.most - 1)
        return self(shown, told, torch.ones_like(tau), before, cache)[1]

    def draw(
        self, noise: Float[Tensor, "b 1 c h w"], before: Int64[Tensor, "b 1"], cache: FilmCache
    ) -> Float[Tensor, "b 1 c h w"]:
        def tell(z: Tensor, tau: Tensor, stride: Tensor) -> Tensor:
            return self(z, tau, stride, before, cache)[0]

        return travel(tell, noise, self.config.steps, self.most).clamp(-1, 1)
