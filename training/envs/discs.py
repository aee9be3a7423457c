"""Discs that fly, fall, and bounce off each other and the frame: exact, from event to event.

Between two events a disc moves on a parabola, y down, x to the right:

    x(t) = x + vx t        y(t) = y + vy t + g t^2 / 2

and every event is the root of a polynomial of degree two at most: a side of the frame is met where
x(t) = r or size - r, the top where y(t) = r, the bottom where y(t) = bottom - r, and two discs
where |x_i(t) - x_j(t)| = r_i + r_j, for which gravity cancels. All contacts are elastic and without
friction, so that energy is kept to rounding. A bottom may be open: then only what lies over a
plate that moves sideways is reflected, and what falls past it is gone for the rest of its life.

Everything is a pure function of float64 torch tensors, on whatever device they are, for many films
at once (what is drawn at random is of numpy). Dimensions: n films, k discs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

EVENTS = 10_000  # after so many in one frame something is wrong
SIDES, TOP, BOTTOM, PAIR = 0, 1, 2, 3  # kinds of events


class Discs(NamedTuple):
    """Where discs are and how they move; mass is the area, in units of pi."""

    x: Float64[Tensor, "n k 2"]
    v: Float64[Tensor, "n k 2"]
    radius: Float64[Tensor, "n k"]


class Frame(NamedTuple):
    """What discs are in.

    Attributes:
        size: its width; the top is at 0.
        bottom: where the floor is, or the plate's upper side.
        gravity: pixels per frame squared, downwards.
        alike: discs have one mass, whatever their radius.
    """

    size: float
    bottom: float
    gravity: float = 0.0
    alike: bool = False


class Plate(NamedTuple):
    """A piece of floor in an open bottom, which slides from `start` to `end` during a frame."""

    start: Float64[Tensor, " n"]
    end: Float64[Tensor, " n"]
    half: float


class Flown(NamedTuple):
    """What a frame led to: the discs, which of them hit the plate, which fell past it."""

    discs: Discs
    hit: Bool[Tensor, "n k"]
    missed: Bool[Tensor, "n k"]


def fly(
    discs: Discs,
    frame: Frame,
    plate: Plate | None = None,
    missed: Bool[Tensor, "n k"] | None = None,
) -> Flown:
    """One frame's time.

    Args:
        plate: without it the floor is closed.
        missed: discs that fell past the plate before.

    Raises:
        RuntimeError: discs overlap, so that they meet without end.
    """
    x, v, radius = discs.x.clone(), discs.v.clone(), discs.radius
    hit = torch.zeros_like(radius, dtype=torch.bool)
    missed = torch.zeros_like(hit) if missed is None else missed.clone()
    left = torch.ones(len(x), dtype=x.dtype, device=x.device)  # of the frame, for each film
    gone = torch.tensor([0.0, frame.gravity], dtype=x.dtype, device=x.device)
    for _ in range(EVENTS):
        wait, kind, first, second = next_event(Discs(x, v, radius), frame, missed)
        step = torch.minimum(wait, left)[:, None, None]
        x = x + step * v + gone * step.square() / 2
        v = v + gone * step
        left = left - step[:, 0, 0]
        rows = torch.nonzero(wait <= step[:, 0, 0])[:, 0]
        if not len(rows):
            return Flown(Discs(x, v, radius), hit, missed)
        kind, first, second = kind[rows], first[rows], second[rows]
        if plate is not None:
            under = kind == BOTTOM
            at, disc = rows[under], first[under]
            middle = plate.end[at] + (plate.start - plate.end)[at] * left[at]
            over = (x[at, disc, 0] - middle).abs() <= plate.half
            hit[at[over], disc[over]] = True
            missed[at[~over], disc[~over]] = True
            kind = kind.clone()
            kind[under] = torch.where(over, BOTTOM, -1)  # nothing is reflected
        bounce(x, v, radius, frame, rows, kind, first, second)
    raise RuntimeError(f"discs met more than {EVENTS} times in one frame: do they overlap?")


def next_event(
    discs: Discs, frame: Frame, missed: Bool[Tensor, "n k"]
) -> tuple[Float64[Tensor, " n"], Int64[Tensor, " n"], Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """For each film: time to the next event, its kind, and which discs."""
    (x, y), (vx, vy) = discs.x.unbind(-1), discs.v.unbind(-1)
    radius, k = discs.radius, discs.radius.shape[1]
    room = torch.where(vx > 0, frame.size - radius - x, radius - x)
    sides = torch.where(vx != 0, room / vx, torch.inf)
    top = rise(y - radius, vy, frame.gravity)
    bottom = fall(y - (frame.bottom - radius), vy, frame.gravity)
    bottom = torch.where(missed, torch.inf, bottom)
    apart = discs.x[:, :, None] - discs.x[:, None]  # [n, k, k, 2]
    closing = discs.v[:, :, None] - discs.v[:, None]
    b = (apart * closing).sum(-1)
    a = closing.square().sum(-1)
    c = apart.square().sum(-1) - (radius[:, :, None] + radius[:, None]).square()
    root = b.square() - a * c
    meet = torch.where((b < 0) & (root > 0), c / (-b + root.clamp(min=0).sqrt()), torch.inf)
    pairs = torch.ones(k, k, dtype=torch.bool, device=x.device).triu(1)
    meet = torch.where(pairs, meet, torch.inf).flatten(1)
    wait, index = torch.cat([sides, top, bottom, meet], dim=1).clamp(min=0).min(dim=1)
    kind = (index // k).clamp(max=PAIR)
    pair = index - PAIR * k
    first = torch.where(kind == PAIR, pair // k, index % k)
    return wait, kind, first, torch.where(kind == PAIR, pair % k, index % k)


def rise(
    height: Float64[Tensor, "n k"], speed: Float64[Tensor, "n k"], gravity: float
) -> Float64[Tensor, "n k"]:
    """Time until what is so far below a line reaches it from below; infinity where it does not."""
    root = speed.square() - 2 * gravity * height
    met = (speed < 0) & (root >= 0)
    return torch.where(met, 2 * height / (root.clamp(min=0).sqrt() - speed), torch.inf)


def fall(
    height: Float64[Tensor, "n k"], speed: Float64[Tensor, "n k"], gravity: float
) -> Float64[Tensor, "n k"]:
    """Time until what is at `height` (negative: above) of a line reaches it from above."""
    root = (speed.square() - 2 * gravity * height).clamp(min=0).sqrt()
    down = torch.where(speed > 0, -2 * height / (root + speed), torch.inf)
    if not gravity:
        return down
    return torch.where(speed > 0, down, (root - speed) / gravity)


def bounce(
    x: Float64[Tensor, "n k 2"],
    v: Float64[Tensor, "n k 2"],
    radius: Float64[Tensor, "n k"],
    frame: Frame,
    rows: Int64[Tensor, " e"],
    kind: Int64[Tensor, " e"],
    first: Int64[Tensor, " e"],
    second: Int64[Tensor, " e"],
) -> None:
    """Change velocities, in place: a component at the frame, or along the line of centres."""
    for wanted, axis in ((SIDES, 0), (TOP, 1), (BOTTOM, 1)):
        at = kind == wanted
        v[rows[at], first[at], axis] *= -1
    at = kind == PAIR
    rows, first, second = rows[at], first[at], second[at]
    normal = x[rows, first] - x[rows, second]
    normal = normal / normal.norm(dim=-1, keepdim=True)
    closing = ((v[rows, first] - v[rows, second]) * normal).sum(-1, keepdim=True)
    share = torch.full_like(closing, 0.5)  # of the second's mass in both
    if not frame.alike:
        one, other = (radius[rows, i, None].square() for i in (first, second))
        share = other / (one + other)
    v[rows, first] -= 2 * share * closing * normal
    v[rows, second] += 2 * (1 - share) * closing * normal


def scatter(
    rng: np.random.Generator,
    radius: Float64[np.ndarray, "n k"],
    size: float,
    bottom: float,
    gap: float = 0.0,
) -> Float64[np.ndarray, "n k 2"]:
    """Places in the frame where no two discs are nearer to each other than `gap`."""
    edge = radius[..., None]
    high = np.concatenate([size - edge, bottom - edge], axis=-1)
    found = rng.uniform(edge, high)
    reach = radius[:, :, None] + radius[:, None] + gap
    alone = 1e9 * np.eye(radius.shape[1])
    while True:
        gaps = np.linalg.norm(found[:, :, None] - found[:, None], axis=-1) + alone
        bad = np.flatnonzero((gaps < reach).any(axis=(1, 2)))
        if not len(bad):
            return found
        found[bad] = rng.uniform(edge[bad], high[bad])


def energy(discs: Discs, frame: Frame) -> Float64[Tensor, " n"]:
    """Kinetic and potential, of all discs, per unit of density and pi."""
    mass = torch.ones_like(discs.radius) if frame.alike else discs.radius.square()
    height = frame.bottom - discs.x[..., 1]
    return (mass * (discs.v.square().sum(-1) / 2 + frame.gravity * height)).sum(-1)


def landing(discs: Discs, frame: Frame) -> Float64[Tensor, "n k"]:
    """Where, across, each disc meets the bottom if it meets no other; without gravity a disc that
    flies level lands where it is."""
    (x, y), (vx, vy) = discs.x.unbind(-1), discs.v.unbind(-1)
    radius = discs.radius
    deep = frame.bottom - radius
    if frame.gravity:
        up = rise(y - radius, vy, frame.gravity)
        turned = -(vy + frame.gravity * up.nan_to_num(posinf=0.0))
        by_top = up + fall(radius - deep, turned, frame.gravity)
        time = torch.where(up.isinf(), fall(y - deep, vy, frame.gravity), by_top)
    else:
        way = torch.where(vy > 0, deep - y, y - radius + deep - radius)
        time = torch.where(vy != 0, way / vy.abs(), 0.0)
    low, high = radius, frame.size - radius
    span = high - low
    phase = torch.remainder(x + vx * time - low, 2 * span)
    return low + torch.where(phase > span, 2 * span - phase, phase)


def draw(
    x: Float64[Tensor, "n k 2"], radius: Float64[Tensor, "n k"], size: int, scale: float = 1.0
) -> Float64[Tensor, "n k size size"]:
    """How much of each pixel a disc covers, its edge one pixel soft.

    Args:
        scale: pixels per unit of length.
    """
    axis = torch.arange(size, device=x.device) + 0.5
    dx, dy = (axis - scale * x[..., i, None] for i in (0, 1))  # [n, k, size]
    distance = (dy[..., :, None].square() + dx[..., None, :].square()).sqrt()
    return (scale * radius[..., None, None] - distance + 0.5).clamp(0, 1)
