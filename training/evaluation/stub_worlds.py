"""Worlds that know nothing, or everything: what a judge must tell from a model.

Each is a `WorldModel` (models/worlds/video/world.py), and is asked the same questions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from training.data.config_worlds import Variant
from training.envs.pinfall import State, render, step
from training.evaluation.pinfall import parse


class CopyLast:
    """The last frame that was seen, over again."""

    context = 1

    def init_cache(
        self, frames: Tensor, actions: Tensor, episodes: Tensor, seed: int = 0
    ) -> Tensor:
        return frames[:, -1]

    def step(self, cache: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return cache, cache


class MeanFrame:
    """The mean of many frames, which many decibels are to be had by."""

    context = 1

    def __init__(self, frames: Float[Tensor, "n t c h w"]) -> None:
        self.mean = frames.flatten(0, 1).mean(0)

    def init_cache(self, frames: Tensor, actions: Tensor, episodes: Tensor, seed: int = 0) -> int:
        return len(frames)

    def step(self, cache: int, action: Tensor) -> tuple[Tensor, int]:
        return self.mean.expand(cache, *self.mean.shape), cache


@dataclass(frozen=True)
class Straight:
    """Where things go that meet nothing."""

    ball: Tensor
    speed: Tensor
    radius: Tensor
    hue: Tensor
    plate: Tensor


class ConstantVelocity:
    """The ball that was read off two frames, going straight on; the paddle stays."""

    context = 2

    def __init__(self, variant: Variant, hue: Int64[Tensor, "n k"], size: int) -> None:
        self.variant, self.hue, self.size = variant, hue, size

    def init_cache(
        self, frames: Tensor, actions: Tensor, episodes: Tensor, seed: int = 0
    ) -> Straight:
        hue = self.hue[episodes]
        read = parse(frames[:, -2:], hue)
        radius = (read.area[:, -1] / torch.pi).sqrt()
        ball = read.ball[:, -1]
        return Straight(ball, ball - read.ball[:, -2], radius, hue, read.plate[:, -1])

    def step(self, cache: Straight, action: Tensor) -> tuple[Tensor, Straight]:
        cache = replace(cache, ball=cache.ball + cache.speed)
        frame = render(cache.ball, cache.radius, cache.hue, cache.plate, self.variant, self.size)
        return frame, cache


class Simulator:
    """The world itself, from the states that the first frames after `context` follow."""

    def __init__(self, state: State, variant: Variant, size: int, context: int) -> None:
        self.state, self.variant, self.size, self.context = state, variant, size, context

    def init_cache(self, frames: Tensor, actions: Tensor, episodes: Tensor, seed: int = 0) -> State:
        return State(*(part[episodes] for part in self.state))

    def step(self, cache: State, action: Int64[Tensor, " b"]) -> tuple[Tensor, State]:
        after = step(cache, action, self.variant).state
        seen: list[Any] = [after.x, after.radius, after.hue, after.plate]
        return render(*seen, self.variant, self.size).float(), after


class Retrieval:
    """The clip of a bank whose first frames are most alike, as it went on."""

    def __init__(self, bank: Float[Tensor, "m t c h w"], context: int) -> None:
        self.bank, self.context = bank, context

    def init_cache(
        self, frames: Tensor, actions: Tensor, episodes: Tensor, seed: int = 0
    ) -> tuple[Tensor, int]:
        known, asked = (x[:, -self.context :].flatten(1) for x in (self.start, frames))
        return torch.cdist(asked, known).argmin(1), 0

    @property
    def start(self) -> Tensor:
        return self.bank[:, : self.context]

    def step(self, cache: tuple[Tensor, int], action: Tensor) -> tuple[Tensor, tuple[Tensor, int]]:
        found, count = cache
        return self.bank[found, self.context + count], (found, count + 1)
