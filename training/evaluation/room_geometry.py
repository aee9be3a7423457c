"""Is the distance of two latents that of a walk between what they stand for?

A planner that sums distances to the goal walks into the wall if the distance is the straight one:
to get to the door it must first go away from the goal. So what plans are worth depends on whether
latents are as far apart as a walk round the wall is long.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from training.envs.two_rooms import Rooms, geodesic, side_of
from training.evaluation.probes import spearman


def geometry(
    z: Float[Tensor, "n d"], positions: Float[Tensor, "n 2"], rooms: Rooms
) -> dict[str, float]:
    """Rank correlations of latent distances with those of walks, and with straight ones.

    Pairs are neighbours after a shuffle of points that share a wall and a door; where all rooms
    differ, each point is paired with those of its own walk only if they come one after another.
    """
    generator = torch.Generator(device=z.device).manual_seed(0)
    order = torch.randperm(len(z), generator=generator, device=z.device)
    a, b = order, order.roll(1)
    same = (rooms.wall[a] == rooms.wall[b]) & (rooms.door[a] == rooms.door[b])
    if same.sum() < 16:
        a = torch.arange(len(z) - 1, device=z.device)
        b = a + 1
        same = (rooms.wall[a] == rooms.wall[b]) & (rooms.door[a] == rooms.door[b])
    a, b = a[same], b[same]
    here = rooms[a]
    latent = (z[a] - z[b]).square().mean(-1)
    walk = geodesic(positions[a], positions[b], here)
    straight = (positions[a] - positions[b]).norm(dim=-1)
    other = side_of(positions[a], here) * side_of(positions[b], here) < 0
    return {
        "eval/distance/walk": spearman(latent, walk),
        "eval/distance/straight": spearman(latent, straight),
        "eval/distance/walk_other_room": spearman(latent[other], walk[other]),
        "eval/distance/straight_other_room": spearman(latent[other], straight[other]),
        "eval/distance/pairs": float(len(a)),
    }
