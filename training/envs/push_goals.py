"""The task of PushWorld3D: where the T should be, and how far from there it is."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from models.worlds.splats.mro_gwm import carried
from training.envs.push_world import PLACED, THINGS, PushState, placed

T = THINGS - 1  # which thing
NEAR = 0.1
"Metres, on the average over points of the T, that are near enough."
LEAST, MOST, TURN = 0.25, 0.5, 0.6  # metres away, radians


def drawn(rng: np.random.Generator) -> tuple[PushState, Float[ndarray, " 7"]]:
    """Where things stand, and the pose that the T should have."""
    while True:
        state = placed(rng)
        angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(LEAST, MOST)
        place = state.poses[T, :2] + far * np.array([math.cos(angle), math.sin(angle)])
        if np.linalg.norm(place) < PLACED:
            break
    goal, half = state.poses[T].copy(), rng.uniform(-TURN, TURN) / 2
    c, s, w, z = math.cos(half), math.sin(half), goal[3], goal[6]
    goal[:2], goal[3:] = place, (c * w - s * z, 0, 0, c * z + s * w)
    return state, goal


def apart(
    poses: Float[Tensor, "*b 7"], goals: Float[Tensor, "*b 7"], anchors: Float[Tensor, "m a 3"]
) -> Float[Tensor, "*b"]:
    """Mean distance of the T's points."""
    a, b = (carried(anchors[T:], x[..., None, :]) for x in (poses, goals))
    return (a - b).norm(dim=-1).mean((-1, -2))
