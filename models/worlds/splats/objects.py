"""A scene of rigid objects: Gaussians that stay, and Gaussians in frames of their own that go where
their object goes. Nothing is sheared, and what is not seen is still there.

Dimensions: m objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.worlds.splats.gaussians import Fields
from models.worlds.splats.rigid import inverse_pose, moved


@dataclass(frozen=True)
class ObjectScene:
    """What `rasterize` takes, in parts."""

    background: Fields
    objects: tuple[Fields, ...]
    "Each in its own frame."

    def at(self, poses: Float[Tensor, "m 7"]) -> Fields:
        """The scene with objects at poses: positions and quaternions wxyz."""
        parts = [self.background]
        parts += [moved(x, pose) for x, pose in zip(self.objects, poses, strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.background}


def divided(scene: Fields, owner: Int[Tensor, " n"], poses: Float[Tensor, "m 7"]) -> ObjectScene:
    """A scene whose Gaussians belong to objects, those of the first being 1.

    Args:
        scene: as `rasterize` takes it.
        owner: of each Gaussian; below 1: nobody.
        poses: of the objects in this scene.
    """
    own = inverse_pose(poses)
    objects = [
        moved({name: x[owner == i + 1] for name, x in scene.items()}, own[i])
        for i in range(len(poses))
    ]
    return ObjectScene({name: x[owner < 1] for name, x in scene.items()}, tuple(objects))


def farthest(scene: Fields, count: int) -> Float[Tensor, "a 3"]:
    """Points of an object, far from each other: means of Gaussians that are opaque, the first the
    one that is furthest from their middle, the next always the one that is from all before it.

    Raises:
        ValueError: it has fewer that are.
    """
    points = scene["means"][scene["opacities"] > 0.5]
    if len(points) < count:
        raise ValueError(f"an object has {len(points)} opaque Gaussians, and {count} are asked for")
    apart = (points - points.mean(0)).norm(dim=-1)
    chosen = [int(apart.argmax())]
    nearest = torch.full_like(apart, torch.inf)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).norm(dim=-1))
        chosen.append(int(nearest.argmax()))
    return points[chosen]
