"""Acting inside a model and outside of it, in the simulator: the same policies, the same rules.

    Inside      frames of a world model; what a step is worth, and whether it was the last, as the
                model tells it
    Outside     frames and rewards of the simulator; it counts the steps that are taken in it

A policy sees frames alone, wherever they are from; the oracle alone is told the state.

Dimensions: n worlds at once, t frames that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from models.worlds.video.noise import even
from models.worlds.video.outcome import BEFORE
from models.worlds.video.world import WorldModel
from training.data.config_worlds import Variant
from training.envs.pinfall import ACTIONS, STRIDE, State, oracle, see, step
from training.evaluation.pinfall import parse
from training.worlds import Start

ACTED = 7  # what numbers are drawn for


class Lived(NamedTuple):
    """What an action led to."""

    frame: Float[Tensor, "n 3 s s"]
    reward: Float[Tensor, " n"]
    end: Bool[Tensor, " n"]


class Place(Protocol):
    """Where one can act."""

    def begin(self, start: Start, episodes: Int64[Tensor, " n"], seed: int) -> Any: ...

    def step(self, cache: Any, action: Int64[Tensor, " n"]) -> tuple[Lived, Any]: ...


class Inside:
    """A world model's dreams."""

    def __init__(self, model: WorldModel) -> None:
        self.model = model

    def begin(self, start: Start, episodes: Tensor, seed: int) -> tuple[Any, Tensor]:
        cache = self.model.init_cache(start.frames, start.actions, episodes, seed)
        return cache, start.frames[:, -BEFORE:]

    @torch.no_grad()
    def step(self, cache: tuple[Any, Tensor], action: Tensor) -> tuple[Lived, Any]:
        dream, before = cache
        frame, dream = self.model.step(dream, action)
        signs, ends = self.model.outcome(before, action, frame)
        lived = Lived(frame, signs.argmax(1).float() - 1, ends.argmax(1) == 1)
        return lived, (dream, torch.cat([before[:, 1:], frame[:, None]], dim=1))


class Outside:
    """The simulator."""

    def __init__(self, variant: Variant, size: int) -> None:
        self.variant, self.size, self.steps = variant, size, 0

    def begin(self, start: Start, episodes: Tensor, seed: int) -> State:
        return start.state

    def step(self, cache: State, action: Tensor) -> tuple[Lived, State]:
        after = step(cache, action.cpu(), self.variant)
        self.steps += len(action)
        frame = see(after.state._asdict(), self.variant, self.size).float().to(action.device)
        return Lived(frame, after.reward.float().to(frame), after.end.to(frame.device)), after.state


Policy = Callable[[Tensor, Tensor, Any], Tensor]
"""Frames [n, t, 3, s, s], numbers [n] spread evenly over (0, 1), the place's cache -> actions."""


def wanderer(seen: Tensor, chance: Tensor, cache: Any) -> Int64[Tensor, " n"]:
    """Anything."""
    return (chance * ACTIONS).long().clamp(max=ACTIONS - 1)


def idler(seen: Tensor, chance: Tensor, cache: Any) -> Int64[Tensor, " n"]:
    """Nothing."""
    return torch.ones(len(seen), dtype=torch.long, device=seen.device)


def follower(noise: float) -> Policy:
    """Goes where the ball is seen, or, so often, anywhere."""

    def act(seen: Tensor, chance: Tensor, cache: Any) -> Int64[Tensor, " n"]:
        hue = torch.zeros(len(seen), 1, dtype=torch.long, device=seen.device)
        read = parse(seen[:, -1:], hue)
        way = read.ball[:, 0, 0, 0] - read.plate[:, 0]
        there = 1 + torch.where(way.abs() > STRIDE / 2, way.sign(), 0.0).long()
        return torch.where(chance < noise, wanderer(seen, chance / max(noise, 1e-9), cache), there)

    return act


def all_knowing(variant: Variant) -> Policy:
    """Goes where the ball will land. Outside alone."""

    def act(seen: Tensor, chance: Tensor, cache: State) -> Int64[Tensor, " n"]:
        return oracle(cache, variant).to(seen.device)

    return act


@torch.no_grad()
def live(
    place: Place, start: Start, policy: Policy, frames: int, seed: int = 0
) -> Float[Tensor, " n"]:
    """What `policy` is rewarded with in so many frames, or until the end."""
    episodes = torch.arange(len(start.frames), device=start.frames.device)
    cache, seen = place.begin(start, episodes, seed), start.frames
    won, on = (
        torch.zeros(len(seen), device=seen.device),
        torch.ones_like(episodes, dtype=torch.bool),
    )
    for count in range(frames):
        chance = even(seed, episodes, (count, ACTED), ())
        lived, cache = place.step(cache, policy(seen, chance, cache))
        won, on = won + lived.reward * on, on & ~lived.end
        seen = torch.cat([seen[:, 1:], lived.frame[:, None]], dim=1)
        if not on.any():
            break
    return won


def ranking(
    inside: Place, outside: Place, start: Start, policies: Mapping[str, Policy], frames: int
) -> dict[str, tuple[float, float]]:
    """Name -> what it is rewarded with inside, and outside."""
    return {
        name: (
            live(inside, start, policy, frames).mean().item(),
            live(outside, start, policy, frames).mean().item(),
        )
        for name, policy in policies.items()
    }
