"""Worlds that a film transformer draws, frame by frame, beside a cache of what was before.

What they share: rewards and ends, checks, noise that is drawn once for each frame, and that a frame
is remembered only when it is clean. A model says what a frame is to it (z: pixels in [-1, 1], or
what a tokenizer makes of them), how z is drawn from noise, and how that of the past is shown to it.

Dimensions: b films, t frames, c channels; z of a frame has a shape of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from models.worlds.video.config import FilmWorldConfig
from models.worlds.video.noise import normal
from models.worlds.video.outcome import DrawnWorld
from models.worlds.video.world import check_actions, check_seen

DRAWN, SHOWN = 0, 1  # what noise is for: the frame itself, or how it is shown later

Kept = TypeVar("Kept", bound=tuple)  # of the past: a FilmCache, or what has one in it


@dataclass(frozen=True)
class Memory(Generic[Kept]):
    """What a dream goes on from."""

    cache: Kept
    episodes: Int64[Tensor, " b"]
    seed: int
    count: int  # frames that were seen or drawn so far
    of: int  # the model's identity: a cache is of no other


def patches_of(x: Float[Tensor, "b t c h w"], p: int, margin: int = 0) -> Float[Tensor, "b t s n"]:
    """Squares of `p` by `p` pixels, row by row, of all channels.

    Args:
        margin: pixels around a square that are in it too; beyond the frame they are 0.
    """
    if not margin:
        return rearrange(x, "b t c (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
    size = p + 2 * margin
    x = F.pad(x, (margin,) * 4).unfold(-2, size, p).unfold(-2, size, p)
    return rearrange(x, "b t c h w p q -> b t (h w) (c p q)")


def pictures_of(x: Float[Tensor, "b t s n"], p: int) -> Float[Tensor, "b t c h w"]:
    """What the patches are of, which is as high as it is wide."""
    side = math.isqrt(x.shape[2])
    return rearrange(x, "b t (h w) (c p q) -> b t c (h p) (w q)", h=side, p=p, q=p)


def widened(x: Float[Tensor, "b t s n"], p: int, margin: int) -> Float[Tensor, "b t s m"]:
    """Patches, each with `margin` pixels of those around it."""
    return patches_of(pictures_of(x, p), p, margin) if margin else x


class FilmWorld(DrawnWorld, Generic[Kept]):
    """What is common to models over film transformers."""

    def __init__(self, config: FilmWorldConfig) -> None:
        super().__init__(config)
        # Numbers of a patch with its margin.
        self.seen = self.channels * (config.patch + 2 * config.margin) ** 2

    def show(
        self,
        z: Shaped[Tensor, "b t ..."],
        before: Int64[Tensor, "b t"],
        noise: Float[Tensor, "b t ..."] | None,
        cache: Kept | None,
    ) -> Kept:
        """The cache with clean frames, as those of the past are shown.

        Args:
            noise: what `noise_shown` gives.
        """
        raise NotImplementedError

    def draw(
        self, noise: Float[Tensor, "b 1 ..."], before: Int64[Tensor, "b 1"], cache: Kept
    ) -> Shaped[Tensor, "b 1 ..."]:
        """A clean frame."""
        raise NotImplementedError

    def encode(self, frames: Float[Tensor, "b t c h w"]) -> Shaped[Tensor, "b t ..."]:
        """What frames in [0, 1] are to the model."""
        return frames * 2 - 1

    def decode(self, z: Shaped[Tensor, "b t ..."]) -> Float[Tensor, "b t c h w"]:
        """Frames in [0, 1]."""
        return (z + 1) / 2

    def noise(self, memory: Memory[Any]) -> Float[Tensor, "b 1 ..."]:
        """What the next frame is drawn from."""
        shape = self.channels, self.size, self.size
        return normal(memory.seed, memory.episodes, (memory.count, DRAWN), shape)[:, None]

    def noise_shown(self, memory: Memory[Any], frames: int) -> Float[Tensor, "b t ..."] | None:
        """What the next frames are mixed with where they are shown later; None: they are clean."""
        return None

    @torch.no_grad()
    def init_cache(
        self,
        frames: Float[Tensor, "b t c h w"],
        actions: Int64[Tensor, "b t-1"],
        episodes: Int64[Tensor, " b"],
        seed: int = 0,
    ) -> Memory[Kept]:
        """What is known of some frames in [0, 1]."""
        check_seen(frames, actions, self.context, self.channels, self.size)
        check_actions(actions, self.actions)
        before = F.pad(actions, (1, 0), value=self.actions)
        memory: Memory[Any] = Memory((), episodes, seed, 0, id(self))
        count = frames.shape[1]
        noise = self.noise_shown(memory, count)
        cache = self.show(self.encode(frames), before, noise, None)
        return replace(memory, cache=cache, count=count)

    @torch.no_grad()
    def step(
        self, cache: Memory[Kept], action: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b c h w"], Memory[Kept]]:
        """The next frame in [0, 1], and what is known with it."""
        if cache.of != id(self):
            raise ValueError("this is the cache of another model: call init_cache of this one")
        check_actions(action, self.actions)
        before = action[:, None]
        noise = self.noise(cache), self.noise_shown(cache, 1)
        frame, kept = self.run(self.advance, *noise, before, cache.cache)
        return frame, replace(cache, cache=kept, count=cache.count + 1)

    def advance(
        self,
        drawn: Float[Tensor, "b 1 ..."],
        shown: Float[Tensor, "b 1 ..."] | None,
        before: Int64[Tensor, "b 1"],
        cache: Kept,
    ) -> tuple[Float[Tensor, "b c h w"], Kept]:
        """A frame in [0, 1] and the cache with it, of the noise of both."""
        z = self.draw(drawn, before, cache)
        return self.decode(z)[:, 0], self.show(z, before, shown, cache)
