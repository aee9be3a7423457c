"""Dreamer 4's tokenizer: a masked autoencoder of frames, through a few latent tokens.

Training Agents Inside of Scalable World Models, 2025, arXiv:2509.24527. The tokens of a frame are
its patches, some of them masked, and `latents` learned ones; blocks over space, in which

    encoder    latents see everything, patches see patches
    decoder    latents see latents, patches see everything

The encoder's latents, through a bottleneck of few channels and a tanh, are what a frame is to the
dynamics: z, in [-1, 1]. The decoder begins from them and from a learned token for every patch.

    loss = |decode(encode(masked x)) - x|^2          share of patches masked ~ uniform(0, most)

What differs: every frame by itself, where the published one is causal in time; no LPIPS beside the
squared error, which wants the weights of a network trained on photographs.

Dimensions: b films, t frames, s patches of a frame, p numbers of a patch, l latents, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kernels.attention.op import attention
from models.worlds.video.config import MaskedTokenizerConfig
from models.worlds.video.film_transformer import unit


class SplitAttention(nn.Module):
    """Over space, between latents (the first tokens) and patches.

    Args:
        encodes: latents see patches; otherwise patches see latents.
    """

    def __init__(self, config: MaskedTokenizerConfig, encodes: bool) -> None:
        super().__init__()
        self.heads, self.latents, self.encodes = config.heads, config.latents, encodes
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h hd) -> three b n h hd", three=3, h=self.heads
        )
        q, k, cut = unit(q), unit(k), self.latents

        def mixed(own: slice, seen: slice) -> Tensor:
            return attention(q[:, own], k[:, seen], v[:, seen], causal=False)

        latents, patches, every = slice(cut), slice(cut, None), slice(None)
        parts = (
            mixed(latents, every if self.encodes else latents),
            mixed(patches, patches if self.encodes else every),
        )
        return self.out(torch.cat(parts, dim=1).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP."""

    def __init__(self, config: MaskedTokenizerConfig, encodes: bool) -> None:
        super().__init__()
        d = config.dim
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(2))
        self.attention = SplitAttention(config, encodes)
        self.enter, self.leave = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.norms[0](x))
        return x + self.leave(F.gelu(self.enter(self.norms[1](x))))


class Tokens(nn.Module):
    """Learned tokens: those of the latents, of the places of patches, and of a mask."""

    def __init__(self, latents: int, places: int, d: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.empty(latents, d))
        self.place = nn.Parameter(torch.empty(places, d))
        self.mask = nn.Parameter(torch.empty(d))

    def init_own(self, generator: torch.Generator | None) -> None:
        for parameter in self.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)


class MaskedTokenizer(nn.Module):
    """Patches of a frame to latents and back."""

    def __init__(self, config: MaskedTokenizerConfig, places: int, pixels: int) -> None:
        super().__init__()
        d, c, self.config = config.dim, config.channels, config
        self.enter = nn.Linear(pixels, d)
        self.tokens, self.asked = (Tokens(config.latents, places, d) for _ in range(2))
        self.encoder, self.decoder = (
            nn.ModuleList(Block(config, encodes) for _ in range(config.depth))
            for encodes in (True, False)
        )
        self.narrow = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, c))
        self.widen = nn.Linear(c, d)
        self.leave = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, pixels))

    def encode(
        self, patches: Float[Tensor, "b t s p"], masked: Bool[Tensor, "b t s"] | None = None
    ) -> Float[Tensor, "b t l c"]:
        """z of frames, some of whose patches are not seen."""
        x = self.enter(patches)
        if masked is not None:
            x = torch.where(masked[..., None], self.tokens.mask, x)
        x = (x + self.tokens.place).flatten(0, 1)
        x = torch.cat([self.tokens.latent.expand(len(x), -1, -1), x], dim=1)
        for block in self.encoder:
            x = block(x)
        z = self.narrow(x[:, : self.config.latents]).tanh()
        return z.unflatten(0, patches.shape[:2])

    def decode(self, z: Float[Tensor, "b t l c"]) -> Float[Tensor, "b t s p"]:
        x = (self.widen(z) + self.asked.latent).flatten(0, 1)
        x = torch.cat([x, (self.asked.mask + self.asked.place).expand(len(x), -1, -1)], dim=1)
        for block in self.decoder:
            x = block(x)
        return self.leave(x[:, self.config.latents :]).unflatten(0, z.shape[:2])
