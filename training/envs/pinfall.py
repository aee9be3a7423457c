"""Pinfall: a ball, a paddle, and physics that can be asked. Exact, in batches, drawn at any size.

A world to learn from video and actions, whose state says at any time what should have been seen.
Discs bounce off the frame and each other (discs.py); the units are those of a frame of 32 x 32, x
to the right, y down. Six variants:

    uniform    one ball in a closed box
    collide    three, of different sizes: mass is their area
    gravity    one that falls
    occlude    one, and a grey screen that it passes behind
    paddle     one, over a paddle that an action moves: 0 left, 1 stay, 2 right
    fork       the same, but that the ball hangs for a few frames and then leaves for the left or
               the right: nothing that is seen says for which

A ball that the paddle hits is worth 1. One that falls past it is worth -1 and ends the episode: no
frame ever shows a ball that was put back.

A ball is drawn in one of six pure hues and everything else in white and grey, so that how much of a
pixel is ball can be read off it (training/evaluation/pinfall.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from training.data.config_worlds import Split, Variant
from training.envs.discs import Discs, Frame, Plate, draw, fly, landing, scatter

SIZE = 32.0
PLATE, PLATE_HALF, PLATE_HEIGHT = 28.0, 4.0, 2.0  # the paddle's upper side, half width, height
STRIDE = 1.5  # by which an action moves it
ACTIONS = 3  # left, stay, right
SCREEN = (12.0, 8.0, 20.0, 24.0)  # of `occlude`: left, top, right, bottom
SCREEN_GREY = 0.5
GRAVITY = 0.04
HUES = torch.tensor(
    [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=torch.float64
)
BALLS = {Variant.collide: 3}  # one in the other variants


def is_open(variant: Variant) -> bool:
    """There is a paddle in place of a floor."""
    return variant in (Variant.paddle, Variant.fork)


def frame_of(variant: Variant) -> Frame:
    gravity = GRAVITY if variant == Variant.gravity else 0.0
    return Frame(SIZE, PLATE if is_open(variant) else SIZE, gravity)


SPEEDS, FAST = (0.8, 1.6), (1.8, 2.4)  # pixels per frame
RADII, LARGE = (1.75, 2.25), (2.75, 3.25)
BANDS = 3  # of speed; hue h is never trained on in band h mod 3


class State(NamedTuple):
    """Of n worlds with k balls. A ball that hangs has the velocity that it will leave with."""

    x: Float64[Tensor, "n k 2"]
    v: Float64[Tensor, "n k 2"]
    radius: Float64[Tensor, "n k"]
    hue: Int64[Tensor, "n k"]
    plate: Float64[Tensor, " n"]
    hang: Int64[Tensor, " n"]
    missed: Bool[Tensor, "n k"]

    def where(self, chosen: Bool[Tensor, " n"], other: State) -> State:
        """This state's rows where `chosen`, the other's elsewhere."""
        return State(
            *(
                torch.where(chosen.view(-1, *[1] * (a.ndim - 1)), a, b)
                for a, b in zip(self, other, strict=True)
            )
        )


class Stepped(NamedTuple):
    """What an action led to."""

    state: State
    reward: Float64[Tensor, " n"]
    end: Bool[Tensor, " n"]


def step(state: State, action: Int64[Tensor, " n"], variant: Variant) -> Stepped:
    """One frame.

    Raises:
        ValueError: an action is none of 0, 1, 2.
    """
    if action.min() < 0 or action.max() >= ACTIONS:
        raise ValueError(f"actions are 0 (left), 1 (stay), 2 (right): {action.tolist()[:8]}")
    plate = (state.plate + STRIDE * (action - 1)).clamp(PLATE_HALF, SIZE - PLATE_HALF)
    slides = Plate(state.plate, plate, PLATE_HALF) if is_open(variant) else None
    discs, hit, missed = fly(
        Discs(state.x, state.v, state.radius), frame_of(variant), slides, state.missed
    )
    hangs = (state.hang > 0)[:, None]
    x = torch.where(hangs[..., None], state.x, discs.x)
    v = torch.where(hangs[..., None], state.v, discs.v)
    hit, missed = hit & ~hangs, torch.where(hangs, state.missed, missed)
    lost = (missed & ~state.missed).any(dim=1)
    reward = hit.any(dim=1).double() - lost.double()
    after = State(x, v, state.radius, state.hue, plate, (state.hang - 1).clamp(min=0), missed)
    return Stepped(after, reward, lost)


def serve(rng: np.random.Generator, n: int, variant: Variant, split: Split, hang: int = 4) -> State:
    """`n` beginnings, drawn by `rng`.

    Args:
        hang: frames that a ball hangs for, before a fork.
    """
    k = BALLS.get(variant, 1)
    radius = rng.uniform(*(LARGE if split == Split.size else RADII), (n, k))
    if variant == Variant.collide:
        radius *= rng.uniform(0.75, 1.5, (n, k))
    hue, pace = tints(rng, n, k, split)
    deep = (PLATE if is_open(variant) else SIZE) - 4.0
    x = scatter(rng, radius, SIZE, deep, gap=0.5)
    turn = rng.uniform(0.1, 0.9, (n, k)) * np.pi  # never level
    turn *= rng.choice([-1.0, 1.0], (n, k))
    v = pace[..., None] * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    left = np.zeros(n, np.int64)
    if variant == Variant.fork:
        x[:] = SIZE / 2, 6.0
        way = rng.choice([-1.0, 1.0], n)
        v[:, 0] = pace * np.stack([0.6 * way, np.full(n, 0.8)], axis=-1)
        left[:] = hang - 1
    plate = rng.uniform(PLATE_HALF, SIZE - PLATE_HALF, n)
    arrays = x, v, radius, hue, plate, left, np.zeros((n, k), bool)
    return State(*(torch.from_numpy(a) for a in arrays))


def tints(
    rng: np.random.Generator, n: int, k: int, split: Split
) -> tuple[Int64[np.ndarray, "n k"], Float64[np.ndarray, "n k"]]:
    """A hue of its own for each ball of a world, and speeds."""
    hue = rng.permuted(np.tile(np.arange(len(HUES)), (n, 1)), axis=1)[:, :k]
    low, high = SPEEDS
    if split == Split.speed:
        return hue, rng.uniform(*FAST, (n, k))
    away = hue % BANDS  # the band that a hue is never trained on in
    other = (away + rng.integers(1, BANDS, (n, k))) % BANDS
    band = away if split == Split.pairs else other
    return hue, low + (band + rng.random((n, k))) * (high - low) / BANDS


def oracle(state: State, variant: Variant) -> Int64[Tensor, " n"]:
    """The action of one who knows where the first ball will land, and goes there once it flies."""
    where = landing(Discs(state.x, state.v, state.radius), frame_of(variant))[:, 0]
    way = torch.where(state.hang > 0, 0.0, where - state.plate)
    return 1 + torch.where(way.abs() > STRIDE / 2, way.sign(), 0.0).long()


def render(
    x: Float[Tensor, "*n k 2"],
    radius: Float[Tensor, "*n k"],
    hue: Int64[Tensor, "*n k"],
    plate: Float[Tensor, " *n"],
    variant: Variant,
    size: int,
) -> Float[Tensor, "*n 3 size size"]:
    """Frames in [0, 1]: black, balls in their hues, the paddle white, the screen grey."""
    scale = size / SIZE
    seen = torch.zeros(*x.shape[:-2], 3, size, size, dtype=x.dtype, device=x.device)
    flat = draw(x.flatten(0, -3), radius.flatten(0, -2), size, scale)
    cover = flat.unflatten(0, x.shape[:-2])  # [*n, k, size, size]
    hues = HUES.to(x)[hue]  # [*n, k, 3]
    for ball in range(x.shape[-2]):
        part = cover[..., ball, None, :, :]
        seen = seen * (1 - part) + hues[..., ball, :, None, None] * part
    if is_open(variant):
        down = between(PLATE, PLATE + PLATE_HEIGHT, size, x)
        across = between(plate[..., None] - PLATE_HALF, plate[..., None] + PLATE_HALF, size, x)
        part = (down[:, None] * across[..., None, :])[..., None, :, :]
        seen = seen * (1 - part) + part
    if variant == Variant.occlude:
        left, top, right, bottom = SCREEN
        part = between(top, bottom, size, x)[:, None] * between(left, right, size, x)
        seen = seen * (1 - part) + SCREEN_GREY * part
    return seen


def see(
    parts: Mapping[str, Tensor], variant: Variant, size: int
) -> Float[Tensor, "*n 3 size size"]:
    """Frames of states by name, as a file would hold them: rounded to 8 bits."""
    x, radius, hue, plate = (parts[name] for name in ("x", "radius", "hue", "plate"))
    return (render(x, radius, hue, plate, variant, size) * 255).round() / 255


def between(low: Tensor | float, high: Tensor | float, size: int, like: Tensor) -> Tensor:
    """[..., size] share of each pixel of an axis that lies between two coordinates."""
    edge = torch.arange(size + 1, dtype=like.dtype, device=like.device) * (SIZE / size)
    low, high = (
        torch.as_tensor(line, dtype=like.dtype, device=like.device) for line in (low, high)
    )
    covered = torch.minimum(edge[1:], high) - torch.maximum(edge[:-1], low)
    return (covered * (size / SIZE)).clamp(0, 1)
