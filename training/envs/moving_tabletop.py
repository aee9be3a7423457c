"""A table whose things move on paths of closed form: where each is at any time is known exactly.

    table = moving_tabletop(rng, 5)       of the things of tabletop.py, each on a path of its own
    table.at(0.25)                        the scene at a quarter of the film

Time goes from 0 to 1. About p, where a thing is at home:

    orbit    p + r (cos(a + 2 pi t), sin(a + 2 pi t))
    slide    p + r sin(2 pi t) (cos a, sin a)
    hop      p + 4 h u (1 - u) z,  u = 2 t mod 1

and all may turn about z, at an even rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from training.envs.ray_tracer import Scene, Solid
from training.envs.tabletop import tabletop

WAYS = "orbit", "slide", "hop", "turn"
ROOMS = 0.18, 0.18, 0.0, 0.0  # how much further each reaches
HOP = 0.45
ARRANGEMENTS = 100  # that are tried before there is no place


@dataclass(frozen=True)
class Path:
    """How a thing moves."""

    way: str
    reach: float
    "Of an orbit, a slide or a hop."
    phase: float
    "Where on its orbit it begins, or which way it slides: radians."
    turns: float
    "About z, from time 0 to 1."

    def shift(self, time: float) -> tuple[float, float, float]:
        """From where it is at home."""
        round_, a = 2 * math.pi * time, self.phase
        if self.way == "orbit":
            return self.reach * math.cos(a + round_), self.reach * math.sin(a + round_), 0.0
        if self.way == "slide":
            far = self.reach * math.sin(round_)
            return far * math.cos(a), far * math.sin(a), 0.0
        if self.way == "hop":
            u = 2 * time % 1.0
            return 0.0, 0.0, 4 * self.reach * u * (1 - u)
        return 0.0, 0.0, 0.0


@dataclass(frozen=True)
class MovingTabletop:
    """The scene with everything at home, and the path of every thing."""

    home: Scene
    paths: dict[int, Path]
    "By id."

    def at(self, time: float) -> Scene:
        """The scene at a time."""
        return replace(self.home, solids=[self.moved(solid, time) for solid in self.home.solids])

    def moved(self, solid: Solid, time: float) -> Solid:
        if solid.id not in self.paths:
            return solid
        path = self.paths[solid.id]
        x, y, z = (a + b for a, b in zip(solid.position, path.shift(time), strict=True))
        half = math.pi * path.turns * time
        rotation = _product((math.cos(half), 0.0, 0.0, math.sin(half)), solid.rotation)
        return replace(solid, position=(x, y, z), rotation=rotation)

    def carried(
        self, points: Float[np.ndarray, "n 3"], id: int, time: float
    ) -> Float[np.ndarray, "n 3"]:
        """Where points that are fixed to a thing at time 0 are at another."""
        (solid,) = (s for s in self.home.solids if s.id == id)
        path, angle = self.paths[id], 2 * math.pi * self.paths[id].turns * time
        c, s = math.cos(angle), math.sin(angle)
        about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        home = np.array(solid.position)
        begun, now = (home + np.array(path.shift(when)) for when in (0.0, time))
        return (points - begun) @ about_z.T + now


def moving_tabletop(rng: np.random.Generator, things: int = 4) -> MovingTabletop:
    """A table of things that orbit, slide, hop and turn, in this order again and again; none gets
    in another's way.

    Raises:
        ValueError: there is no place for so many.
    """
    for attempt in range(ARRANGEMENTS):
        try:
            home = tabletop(rng, things, ROOMS)
            break
        except ValueError:
            if attempt == ARRANGEMENTS - 1:
                raise
    paths = {}
    for number in range(things):
        way, phase = WAYS[number % len(WAYS)], float(rng.uniform(0, 2 * math.pi))
        reach = HOP if way == "hop" else ROOMS[number % len(ROOMS)]
        turns = float(rng.choice([-1, 1]) * rng.uniform(0.2, 0.4))
        paths[number + 1] = Path(way, reach, phase, turns)
    return MovingTabletop(home, paths)


def _product(p: tuple[float, ...], q: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Of quaternions wxyz: turned by q, then by p."""
    a, b, c, d = p
    e, f, g, h = q
    return (
        a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e,
    )  # fmt: skip
