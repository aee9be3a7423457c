"""A round table with things on it, and cameras around: what static scenes are reconstructed from.

    scene = tabletop(rng)                   four striped balls, two boxes, a capsule, a cylinder
    viewmats = cameras_around(rng, 60)      on a ring, with jitter, at 15 to 65 degrees

Things stand on the table, none inside another. Ids: 0 is the table, things from 1 on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from training.envs.ray_tracer import Lamp, Scene, Solid, look_at

RADIUS = 1.3  # of the table
DISTANCE = 3.2  # of cameras from what they look at
LOOKED_AT = (0.0, 0.0, 0.2)
ELEVATION = 15.0, 65.0  # degrees
FOCAL = 1.1  # times the width of an image
GAP = 0.03  # between things
TRIES = 1000


def tabletop(rng: np.random.Generator, things: int = 8, rooms: Sequence[float] = (0.0,)) -> Scene:
    """A table with so many things, in this order again and again: ball, box, ball, capsule, ball,
    box, ball, cylinder.

    Args:
        rooms: how much further each of them reaches on its ways, again and again.
    Raises:
        ValueError: there is no place for so many.
    """
    solids = [
        Solid("disc", (RADIUS,), pattern="checker", width=0.25, color=(0.85, 0.82, 0.75),
              other=(0.45, 0.5, 0.6), id=0)
    ]  # fmt: skip
    kinds = ("sphere", "box", "sphere", "capsule", "sphere", "box", "sphere", "cylinder")
    placed: list[tuple[float, float, float]] = []
    for number in range(things):
        kind = kinds[number % len(kinds)]
        size, height, reach, rotation = _shape(rng, kind)
        reach += rooms[number % len(rooms)]
        x, y = _place(rng, placed, reach)
        placed.append((x, y, reach))
        paint = {"color": _bright(rng), "other": _bright(rng) if kind == "sphere" else (0, 0, 0)}
        solids.append(
            Solid(
                kind,
                size,
                (x, y, height),
                rotation,
                **paint,
                shine=float(rng.uniform(0, 0.6)),
                pattern="stripes" if kind == "sphere" else "plain",
                width=size[0] / 2.5,
                id=number + 1,
            )
        )
    return Scene(solids, Lamp())


def _shape(rng: np.random.Generator, kind: str) -> tuple[tuple[float, ...], float, float, tuple]:
    """Size, height of the middle above the table, radius of the place it takes, rotation."""
    turn = rng.uniform(0, math.pi)
    upright = (math.cos(turn), 0.0, 0.0, math.sin(turn))
    if kind == "sphere":
        tilt = rng.normal(size=4)
        radius = rng.uniform(0.15, 0.32)
        return (radius,), radius, radius, tuple(tilt / np.linalg.norm(tilt))
    if kind == "box":
        size = tuple(rng.uniform(0.1, 0.25, 3))
        return size, size[2], math.hypot(*size[:2]), upright
    radius, half = rng.uniform(0.08, 0.14), rng.uniform(0.12, 0.22)
    if kind == "cylinder":
        return (radius, half), half, radius, upright
    lying = (  # about z, of what was turned about y from upright to lying
        math.cos(turn) * math.sqrt(0.5), -math.sin(turn) * math.sqrt(0.5),
        math.cos(turn) * math.sqrt(0.5), math.sin(turn) * math.sqrt(0.5),
    )  # fmt: skip
    return (radius, half), radius, radius + half, lying


def _place(
    rng: np.random.Generator, placed: list[tuple[float, float, float]], reach: float
) -> tuple[float, float]:
    for _ in range(TRIES):
        angle, far = rng.uniform(0, 2 * math.pi), math.sqrt(rng.uniform()) * (RADIUS - reach)
        x, y = far * math.cos(angle), far * math.sin(angle)
        if all(math.hypot(x - a, y - b) > reach + other + GAP for a, b, other in placed):
            return x, y
    raise ValueError(f"there is no place on the table for {len(placed) + 1} things")


def _bright(rng: np.random.Generator) -> tuple[float, float, float]:
    color = rng.uniform(0.1, 0.9, 3)
    return tuple(color * 0.9 / color.max())  # type: ignore[return-value]


def cameras_around(rng: np.random.Generator, count: int) -> Float[Tensor, "c 4 4"]:
    """World to camera, of cameras that look at the middle of the table."""
    azimuth = (np.arange(count) + rng.uniform(size=count)) * 2 * math.pi / count
    elevation = np.radians(rng.uniform(*ELEVATION, count))
    ring = (
        np.cos(elevation) * np.cos(azimuth),
        np.cos(elevation) * np.sin(azimuth),
        np.sin(elevation),
    )
    target = torch.tensor(LOOKED_AT).expand(count, 3)
    return look_at(
        target + DISTANCE * torch.tensor(np.stack(ring, -1), dtype=torch.float32), target
    )
