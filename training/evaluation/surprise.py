"""Violation of expectation: is a model more surprised by what cannot happen?

Pairs of films that are alike but for one event, one of which breaks the rules of the world (Riochet
et al., IntPhys, 2018, arXiv:1803.07616). A model's surprise is the largest error of its predictions
of the next latent along the film; it is right about a pair if the impossible film surprises it
more. Chance is one half.

    teleport    the dot is somewhere else all of a sudden
    vanish      it is not seen any more
    through     it passes the wall where there is no door
    colour      it changes its brightness: unusual, but no rule of the world is about it
    reversed    the walk is told backwards with the actions turned round: the negative control,
                as a walk that aims at nothing looks the same both ways
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from models.worlds.jepa.targets import Latents
from training.envs.two_rooms import DOT_WIDTH, Rooms, blocks, is_solid
from training.evaluation.statistics import wilson_interval

EVENTS = ("teleport", "vanish", "through", "colour", "reversed")
FAR = 8.0  # pixels at least, of a teleport
DIM = 0.5  # brightness after a change of colour


class Predictor(Protocol):
    """What surprise asks of a model."""

    def encode(self, frames: Tensor) -> Tensor: ...
    def rollout(self, z: Tensor, actions: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Film:
    """Frames [n, t, c, s, s] and what was done between them [n, t-1, a]."""

    frames: Tensor
    actions: Tensor


def surprises(model: Predictor, film: Film) -> Float[Tensor, "n t-1"]:
    """Mean squared error of each next latent, predicted from the one before."""
    z = model.encode(film.frames)
    before = z[:, :-1].flatten(0, 1)
    told = model.rollout(before, film.actions.flatten(0, 1)[:, None])[:, 0]
    return (told - z[:, 1:].flatten(0, 1)).square().mean(-1).unflatten(0, film.actions.shape[:2])


def violations(
    see: Callable[[Tensor, Rooms], Tensor],
    positions: Float[Tensor, "n t 2"],
    actions: Float[Tensor, "n t-1 2"],
    rooms: Rooms,
    generator: torch.Generator,
) -> dict[str, tuple[Film, Film]]:
    """Event -> (possible, impossible) films of the same walks."""
    count, length = positions.shape[:2]
    middle, device = length // 2, positions.device
    possible = Film(see(positions, rooms), actions)
    found = {}

    moved = positions.clone()
    shift = elsewhere(positions[:, middle], rooms, generator) - positions[:, middle]
    moved[:, middle:] = (positions[:, middle:] + shift[:, None]).clamp(5.0, 59.0)
    found["teleport"] = possible, Film(see(moved, rooms), actions)

    late = (torch.arange(length, device=device) >= middle)[:, None, None]
    frames, empty = possible.frames, see(torch.full_like(positions, -50 * DOT_WIDTH), rooms)
    gone, dim = frames.clone(), frames.clone()
    gone[:, :, 0] = torch.where(late, empty[:, :, 0], frames[:, :, 0])
    dimmed = empty[:, :, 0] + DIM * (frames[:, :, 0] - empty[:, :, 0])
    dim[:, :, 0] = torch.where(late, dimmed, frames[:, :, 0])
    found["vanish"] = possible, Film(gone, actions)
    found["colour"] = possible, Film(dim, actions)

    # A straight walk at the wall, away from the door: it stops, or it goes on behind the wall.
    through, stopped, straight = straight_walks(count, length, rooms, generator)
    found["through"] = Film(see(stopped, rooms), straight), Film(see(through, rooms), straight)

    blocked = (positions[:, 1:] == positions[:, :-1]).all(-1, keepdim=True)
    turned = torch.where(blocked, actions, -actions)
    found["reversed"] = possible, Film(see(positions.flip(1), rooms), turned.flip(1))
    return found


def elsewhere(
    position: Float[Tensor, "n 2"], rooms: Rooms, generator: torch.Generator
) -> Float[Tensor, "n 2"]:
    """Free points that are far from `position`."""
    found = position.clone()
    bad = torch.ones(len(position), dtype=torch.bool, device=position.device)
    while bad.any():
        drawn = torch.rand(position.shape, generator=generator, device=position.device)
        found = torch.where(bad[:, None], 6 + 52 * drawn, found)
        bad = is_solid(found, rooms) | ((found - position).norm(dim=-1) < FAR)
    return found


def straight_walks(
    count: int, length: int, rooms: Rooms, generator: torch.Generator
) -> tuple[Float[Tensor, "n t 2"], Float[Tensor, "n t 2"], Float[Tensor, "n t-1 2"]]:
    """Walks along rows that the wall stands across: (through it, stopped by it), their actions."""
    device = rooms.wall.device
    side = torch.where(torch.rand(count, generator=generator, device=device) < 0.5, -1.0, 1.0)
    row = torch.rand(count, generator=generator, device=device)
    row = 8 + 48 * row
    off = (row - rooms.door).abs() < 7  # too near to the door: further on
    row = torch.where(off, torch.where(rooms.door < 32, rooms.door + 12, rooms.door - 12), row)
    steps = torch.arange(length, device=device)
    # The wall is met in the middle of the film.
    x = rooms.wall[:, None] + side[:, None] * (length / 2 - steps)
    through = torch.stack([x, row[:, None].expand_as(x)], dim=-1).clamp(5.0, 59.0)
    actions = torch.zeros(count, length - 1, 2, device=device)
    actions[..., 0] = -side[:, None]
    passed = blocks(
        through[:, :1].expand_as(through),
        through,
        Rooms(*(r[:, None] for r in (rooms.wall, rooms.door))),
    )
    before = ~passed
    last = before.long().cumsum(1).argmax(1)  # the last position in front of the wall
    halted = through[torch.arange(count, device=device), last]
    stopped = torch.where(passed[..., None], halted[:, None], through)
    return through, stopped, actions


def told_along(model: Callable[..., Latents], film: Film) -> Float[Tensor, "n t-1"]:
    """The same for a model that tells each next latent from all before it."""
    found = model(film.frames, film.actions)
    return (found.predicted - found.target).square().mean(-1)


def judge(
    model: Any,
    films: dict[str, tuple[Film, Film]],
    surprise: Callable[[Any, Film], Tensor] = surprises,
) -> dict[str, dict[str, Any]]:
    """Event -> share of pairs that the model is right about, with Wilson's interval."""
    found = {}
    for event, (possible, impossible) in films.items():
        plain, odd = (surprise(model, film).amax(dim=1) for film in (possible, impossible))
        right = (odd > plain).float() + 0.5 * (odd == plain).float()
        count = len(right)
        low, high = wilson_interval(round(right.sum().item()), count)
        found[event] = {
            "accuracy": right.mean().item(),
            "low": low,
            "high": high,
            "ratio": (odd.median() / plain.median().clamp(min=1e-12)).item(),
            "pairs": count,
        }
    return found
