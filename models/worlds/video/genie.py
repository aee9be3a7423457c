"""Genie: worlds of tokens, and actions that nobody labelled.

Genie: Generative Interactive Environments, 2024, arXiv:2402.15391. Three parts, each learned
without the others' gradients:

    Tokenizer       patches of a frame -> codes -> the frame                          (fsq.py)
    LatentActions   x_1 .. x_{t+1} -> one of few codes, from which and x_1 .. x_t the frame x_{t+1}
                    is told: what must be known besides the past is what was done
    Dynamics        codes of frames, some masked, and the actions before them -> logits of codes

A frame is drawn in `steps` steps of MaskGIT (maskgit.py) beside a cache of the frames before. To be
steered by the actions of a world, each is given the latent one that a few labelled clips say it
most often is (`named`), as the paper does for cloning behaviour. With `latent_levels=[]` the
dynamics is told the actions themselves.

What differs: finite scalar quantisation in the place of learned codebooks; the tokenizer sees each
frame by itself, and with `local` each patch with its margin: what is still keeps its codes. Actions
are read off where the model looks, with `local` from two frames by convolutions, and told as what
changes from x_t. The dynamics is shown the numbers of codes and what the frame before looked like,
and tells each number by itself: neighbours among codes are alike to it.

Dimensions: b films, t frames, c channels, s patches of a frame, d width, k numbers of a code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.worlds.initialise import init_uniform, init_zero
from models.worlds.jepa.regularizers import hinge_std, moments, off_diagonal
from models.worlds.video.actions import ActionTable
from models.worlds.video.config import FilmTransformerConfig, GenieConfig
from models.worlds.video.film_transformer import FilmCache, FilmTransformer
from models.worlds.video.film_world import (
    DRAWN,
    FilmWorld,
    Memory,
    patches_of,
    pictures_of,
    widened,
)
from models.worlds.video.fsq import code_of, index_of, joined, quantise, size_of
from models.worlds.video.maskgit import fill
from models.worlds.video.noise import even

LARGE = 1.5  # what a number of a latent action is let be before it is rounded


class Known(NamedTuple):
    """What is kept of the past."""

    film: FilmCache
    last: Float[Tensor, "b 1 s p"]  # patches of the last frame


class Patches(nn.Module):
    """Frames to tokens that know their places: where a transformer over frames begins."""

    def __init__(self, seen: int, places: int, config: GenieConfig) -> None:
        super().__init__()
        self.patch, self.margin, d = config.patch, config.margin, config.transformer.dim
        self.enter = nn.Linear(seen, d)
        self.place = Places(places, d)

    def forward(self, patches: Float[Tensor, "b t s p"]) -> Float[Tensor, "b t s d"]:
        return self.place(self.enter(widened(patches, self.patch, self.margin)))


class Places(nn.Module):
    """What tokens are told of their places."""

    def __init__(self, places: int, d: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(places, d))

    def init_own(self, generator: torch.Generator | None) -> None:
        self.place.normal_(0.0, 0.02, generator=generator)

    def forward(self, x: Float[Tensor, "b t s d"]) -> Float[Tensor, "b t s d"]:
        return x + self.place


class Alone(nn.Module):
    """MLPs that see each token by itself, in the place of a transformer over frames."""

    def __init__(self, layers: FilmTransformerConfig) -> None:
        super().__init__()
        d, wide = layers.dim, layers.mlp_ratio * layers.dim
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(d), nn.Linear(d, wide), nn.GELU(), nn.Linear(wide, d))
            for _ in range(layers.depth)
        )

    def forward(
        self, x: Float[Tensor, "b t s d"], c: None
    ) -> tuple[Float[Tensor, "b t s d"], None]:
        for block in self.blocks:
            x = x + block(x)
        return x, None


class Tokenizer(nn.Module):
    """Patches of a frame to codes and back, each frame by itself."""

    def __init__(self, pixels: int, seen: int, places: int, config: GenieConfig) -> None:
        super().__init__()
        layers = replace(config.transformer, depth=config.tokenizer_depth, time_every=1)
        d, self.levels = layers.dim, config.levels
        self.enter = Patches(seen, places, config)
        self.encoder = (
            Alone(layers)
            if config.local
            else FilmTransformer(layers, conditioned=False, over_time=False)
        )
        self.to_code = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, len(self.levels)))
        self.from_code = nn.Linear(len(self.levels), d)
        self.place = Places(places, d)
        self.decoder = FilmTransformer(layers, conditioned=False, over_time=False)
        self.leave = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, pixels))

    def encode(self, patches: Float[Tensor, "b t s p"]) -> Float[Tensor, "b t s k"]:
        """Codes, through which a gradient flows."""
        return quantise(self.to_code(self.encoder(self.enter(patches), None)[0]), self.levels)

    def decode(self, code: Float[Tensor, "b t s k"]) -> Float[Tensor, "b t s p"]:
        return self.leave(self.decoder(self.place(self.from_code(code)), None)[0])


class Past(nn.Module):
    """A transformer over each frame and all before it."""

    def __init__(self, seen: int, places: int, config: GenieConfig) -> None:
        super().__init__()
        self.enter = Patches(seen, places, config)
        layers = replace(config.transformer, depth=config.latent_depth)
        self.transformer = FilmTransformer(layers, conditioned=False)

    def forward(self, patches: Float[Tensor, "b t s p"]) -> Float[Tensor, "b t-1 s d"]:
        """Of each frame but the first."""
        return self.transformer(self.enter(patches), None)[0][:, 1:]


class Changes(nn.Module):
    """Convolutions over two frames: what moves is told alike wherever it is."""

    def __init__(self, pixels: int, config: GenieConfig) -> None:
        super().__init__()
        self.patch, d = config.patch, config.transformer.dim
        channels = pixels // config.patch**2
        self.layers = nn.Sequential(
            nn.Conv2d(2 * channels, d // 2, 5, padding=2),
            nn.SiLU(),
            nn.Conv2d(d // 2, d, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(d, d, 3, padding=1),
        )

    def forward(self, patches: Float[Tensor, "b t s p"]) -> Float[Tensor, "b t-1 n d"]:
        """Of each frame but the first, from it and what changed in it; n is h w / 4."""
        frames = pictures_of(patches, self.patch)
        seen = torch.cat([frames[:, 1:], frames.diff(dim=1)], dim=2)
        return rearrange(self.layers(seen.flatten(0, 1)), "(b t) d h w -> b t (h w) d", b=len(seen))


class LatentActions(nn.Module):
    """What was done between two frames: told from them alone (`local`), or from all before too."""

    def __init__(self, pixels: int, seen: int, places: int, config: GenieConfig) -> None:
        super().__init__()
        layers = replace(config.transformer, depth=config.latent_depth)
        d, self.levels = layers.dim, config.latent_levels
        self.encoder = Changes(pixels, config) if config.local else Past(seen, places, config)
        self.where = nn.Linear(d, 1)
        self.to_code = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, len(self.levels)))
        self.again = Patches(seen, places, config)
        self.from_code = nn.Linear(len(self.levels), d)
        self.decoder = FilmTransformer(layers, conditioned=False)
        self.leave = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, pixels))

    def numbers(self, patches: Float[Tensor, "b t s p"]) -> Float[Tensor, "b t-1 k"]:
        """What is rounded to the code of what was done before each frame but the first."""
        seen = self.encoder(patches)
        return self.to_code((self.where(seen).softmax(dim=2) * seen).sum(dim=2))

    def encode(self, patches: Float[Tensor, "b t s p"]) -> Float[Tensor, "b t-1 k"]:
        """The code of what was done before each frame but the first."""
        return quantise(self.numbers(patches), self.levels)

    def decode(
        self, past: Float[Tensor, "b t s p"], code: Float[Tensor, "b t k"]
    ) -> Float[Tensor, "b t s p"]:
        """The frames that follow those of the past, each told what was done after it."""
        x = self.again(past) + self.from_code(code)[:, :, None]
        return past + self.leave(self.decoder(x, None)[0])


class Dynamics(nn.Module):
    """Codes of frames, some masked, to logits of codes."""

    def __init__(self, seen: int, places: int, parts: Sequence[int], config: GenieConfig) -> None:
        super().__init__()
        d, codes = config.transformer.dim, size_of(config.levels)
        # The numbers after the last code, and after the last action.
        self.mask, self.none = codes, math.prod(parts)
        self.levels = config.levels
        self.enter = nn.Embedding(codes + 1, d)
        self.number = nn.Linear(len(self.levels), d, bias=False)
        self.again = Patches(seen, places, config)
        self.action = ActionTable(parts, d, none=True)
        self.transformer = FilmTransformer(config.transformer, conditioned=False)
        self.leave = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, sum(self.levels)))

    def forward(
        self,
        tokens: Int64[Tensor, "b t s"],
        before: Int64[Tensor, "b t"],
        past: Float[Tensor, "b t s p"],
        cache: FilmCache | None = None,
    ) -> tuple[Float[Tensor, "b t s v"], FilmCache]:
        """Logits of the tokens of each frame, and the cache with them.

        Args:
            past: the frame before each.
        """
        known = code_of(tokens, self.levels).masked_fill(tokens[..., None] == self.mask, 0.0)
        x = self.enter(tokens) + self.number(known)
        x = x + self.again(past) + self.action(before)[:, :, None]
        x, kept = self.transformer(x, None, cache)
        return joined(self.leave(x), self.levels), kept


class Genie(FilmWorld[Known]):
    """Draws tokens of the next frames. A frame is its tokens, [s] of it."""

    config: GenieConfig
    named: Tensor

    def __init__(self, config: GenieConfig) -> None:
        super().__init__(config)
        pixels, places = self.channels * config.patch**2, (self.size // config.patch) ** 2
        self.places = places
        sizes = pixels, self.seen, places
        self.tokenizer = Tokenizer(*sizes, config)
        self.latents = LatentActions(*sizes, config) if config.latent_levels else None
        self.told = size_of(config.latent_levels) if config.latent_levels else self.actions
        parts = [self.told] if self.latents else self.parts
        self.dynamics = Dynamics(self.seen, places, parts, config)
        # Which latent action each action of the world is.
        count = self.actions if self.latents else 0
        self.register_buffer("named", torch.zeros(count, dtype=torch.long))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random weights; at first all codes are as likely, and nothing is told to change."""
        init_uniform(self, generator)
        self.named.copy_(torch.arange(len(self.named)) % self.told)
        init_zero(self.dynamics.leave[1], *([self.latents.leave[1]] if self.latents else []))

    def cut(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t s p"]:
        """Patches of frames, in [-1, 1]."""
        return patches_of(frames, self.config.patch) * 2 - 1

    def prepare(
        self,
        frames: Float[Tensor, "b t c h w"],
        jitter: Float[Tensor, "b t-1 k"] | float | None = 0.0,
    ) -> dict[str, Float[Tensor, ""]]:
        """Errors of the tokenizer and of the latent actions, of frames in [0, 1].

        Args:
            jitter: noise on the numbers of latent actions before they are rounded: what lies
                between two codes tells little. None: of the tokenizer alone.
        """
        x = self.cut(frames)
        found = {"tokenizer": F.mse_loss(self.tokenizer.decode(self.tokenizer.encode(x)), x)}
        if self.latents is not None and jitter is not None:
            numbers = self.latents.numbers(x)
            told = self.latents.decode(x[:, :-1], quantise(numbers + jitter, self.latents.levels))
            found["latents"] = F.mse_loss(told, x[:, 1:])
            found["alike"] = alike(numbers)
        return found

    @torch.no_grad()
    def done(
        self, frames: Float[Tensor, "b t c h w"], actions: Int64[Tensor, "b t-1"]
    ) -> Int64[Tensor, "b t-1"]:
        """What the dynamics is told of what was done between frames: latent actions, or true."""
        if self.latents is None:
            return actions
        return index_of(self.latents.encode(self.cut(frames)), self.latents.levels)

    @torch.no_grad()
    def looks(self, tokens: Int64[Tensor, "b t s"]) -> Float[Tensor, "b t s p"]:
        """What tokens look like."""
        return self.tokenizer.decode(code_of(tokens, self.config.levels)).clamp(-1, 1)

    def forward(
        self,
        tokens: Int64[Tensor, "b t s"],
        before: Int64[Tensor, "b t"],
        past: Float[Tensor, "b t s p"],
        cache: FilmCache | None = None,
    ) -> tuple[Float[Tensor, "b t s v"], FilmCache]:
        """What the dynamics tells; `before` as `done` has it."""
        return self.dynamics(tokens, before, past, cache)

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b t c h w"]) -> Int64[Tensor, "b t s"]:
        return index_of(self.tokenizer.encode(self.cut(frames)), self.config.levels)

    @torch.no_grad()
    def decode(self, z: Int64[Tensor, "b t s"]) -> Float[Tensor, "b t c h w"]:
        return (pictures_of(self.looks(z), self.config.patch) + 1) / 2

    def noise(self, memory: Memory[Any]) -> Float[Tensor, "b 1 steps 2 s"]:
        shape = self.config.steps, 2, self.places
        return even(memory.seed, memory.episodes, (memory.count, DRAWN), shape)[:, None]

    def show(
        self,
        z: Int64[Tensor, "b t s"],
        before: Int64[Tensor, "b t"],
        noise: Tensor | None,
        cache: Known | None,
    ) -> Known:
        """As they are."""
        looks = self.looks(z)
        past = after(looks, cache and cache.last)
        film = self(z, self.latent(before), past, cache and cache.film)[1]
        return Known(film, looks[:, -1:])

    def draw(
        self, noise: Float[Tensor, "b 1 steps 2 s"], before: Int64[Tensor, "b 1"], cache: Known
    ) -> Int64[Tensor, "b 1 s"]:
        config, done = self.config, self.latent(before)

        def tell(tokens: Tensor) -> Tensor:
            return self(tokens[:, None], done, cache.last, cache.film)[0][:, 0]

        mask = self.dynamics.mask
        return fill(tell, noise[:, 0], mask, config.temperature, config.choice)[:, None]

    def latent(self, before: Int64[Tensor, "b t"]) -> Int64[Tensor, "b t"]:
        """What the dynamics is told of actions of the world, of which the last is none."""
        if self.latents is None:
            return before
        return F.pad(self.named, (0, 1), value=self.dynamics.none)[before]


def after(
    looks: Float[Tensor, "b t s p"], last: Float[Tensor, "b 1 s p"] | None = None
) -> Float[Tensor, "b t s p"]:
    """The frame before each: before the first, `last`, or nothing, which is 0."""
    last = torch.zeros_like(looks[:, :1]) if last is None else last
    return torch.cat([last, looks[:, :-1]], dim=1)


def alike(numbers: Float[Tensor, "b t k"]) -> Float[Tensor, ""]:
    """How little the numbers of latent actions differ: 0 if each varies in a clip, by itself.

    One code for everything tells nothing, and nothing that is told leads away from it. As VICReg
    (2021, arXiv:2105.04906) has it, each should vary by 1 or more and none with another; and none
    should be so large that its rounding lets no gradient through.
    """
    covariance = torch.vmap(moments)(numbers)
    spread = torch.vmap(hinge_std)(covariance) + 0.2 * torch.vmap(off_diagonal)(covariance)
    return spread.mean() + F.relu(numbers.abs() - LARGE).square().mean()
