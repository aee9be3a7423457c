"""A few views of tables that nobody has seen: `data=random_tables`.

Scene number i of a seed is always the same; each is another table, seen by two cameras not far from
each other, and by a third between or beside them, which is asked for. Cameras are told as seen from
the first of them. Depth is exact, and never given. With `data.scale` scenes are of different sizes,
which only the cameras' ways tell, as of videos whose cameras a program has found.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float32

from training.data.config_scenes import RandomTablesConfig
from training.data.order import rank_slice, visit
from training.data.tabletop import device_of_tracing
from training.envs.ray_tracer import intrinsics, look_at, render
from training.envs.tabletop import DISTANCE, FOCAL, LOOKED_AT, tabletop
from training.seeding import numpy_rng

CONTEXT = 2
NEAREST, FURTHEST = 1.8, 5.0
"That anything is seen, with data.scale=1."
ELEVATION = 20.0, 50.0  # degrees
TRIES = 50  # arrangements, before a scene has one thing less


@dataclass(frozen=True)
class Glimpses:
    """Of n scenes: two views that are given, and, last, the one that is asked for."""

    images: Float32[np.ndarray, "n 3 h w 3"]
    viewmats: Float32[np.ndarray, "n 3 4 4"]
    "First camera to camera."
    Ks: Float32[np.ndarray, "n 3 3 3"]
    depths: Float32[np.ndarray, "n 3 h w"]
    "Along z, infinite where nothing is."
    table: Float32[np.ndarray, "n 4"]
    "Plane (a, b, c, d) of the table: a x + b y + c z = d, as seen from the first camera."

    def some(self, rows: np.ndarray) -> Glimpses:
        return Glimpses(*(getattr(self, f.name)[rows] for f in fields(self)))


class RandomTablesData:
    """Traced when it is opened, on a GPU if there is one: about a minute for two thousand scenes of
    32 x 32 on one core."""

    def __init__(
        self, config: RandomTablesConfig, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.config, self.seed, self.rank, self.world = config, seed, rank, world
        self.train = self.made("train", config.scenes)
        self.heldout = self.made("heldout", config.heldout)

    def made(self, part: str, count: int) -> Glimpses:
        """So many of a stream."""
        found = [self.one(numpy_rng(self.seed, f"data/tables/{part}", i)) for i in range(count)]
        return Glimpses(*(np.stack(x) for x in zip(*found, strict=True)))

    def one(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """One scene and its three views."""
        config, device = self.config, device_of_tracing()
        scene, size = arranged(rng, config.things), config.image_size
        viewmats = look_at(*cameras(rng, config.apart))
        scale = float(config.scale ** rng.uniform(-1, 1))
        Ks = intrinsics(FOCAL * size, size, size).expand(CONTEXT + 1, 3, 3)
        seen = render(scene, viewmats.to(device), Ks.to(device), size, size, config.samples)
        first = viewmats[0]
        relative = viewmats @ torch.linalg.inv(first)
        relative[:, :3, 3] *= scale
        up = first[:3, 2]  # of the world's z, as the first camera sees it
        plane = torch.cat([up, scale * (up @ first[:3, 3])[None]])
        arrays = seen.color.cpu(), relative, Ks.contiguous(), scale * seen.depth.cpu(), plane
        return tuple(x.numpy() for x in arrays)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        size, chosen = self.config.batch_size, self.train
        rows = visit(step * size, size, len(chosen.images), self.seed)
        mine, others = (rank_slice(x, self.rank, self.world) for x in (rows, np.roll(rows, 1)))
        some = chosen.some(mine)
        images = some.images
        if self.config.shuffled:  # the view that is asked for is another scene's
            images = images.copy()
            images[:, CONTEXT] = chosen.images[others, CONTEXT]
        return {"images": images, "viewmats": some.viewmats, "Ks": some.Ks}

    def ids(self, step: int) -> list[str]:
        return [f"scenes of step {step}"]

    @property
    def content_hash(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.heldout):
            for x in (part.images, part.viewmats, part.Ks):
                found.update(np.ascontiguousarray(x))
        return found.hexdigest()


def arranged(rng: np.random.Generator, things: int):
    """A table with up to so many things."""
    for count in range(int(rng.integers(1, things + 1)), 0, -1):
        for _ in range(TRIES):
            try:
                return tabletop(rng, count)
            except ValueError:
                continue
    raise ValueError("there is no place for a single thing")


def cameras(rng: np.random.Generator, apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eyes and what they look at: two so many degrees apart, the third between them, or beyond by
    up to a quarter of that."""
    first, span = rng.uniform(0, 2 * math.pi), math.radians(apart)
    azimuth = first + span * np.array([0.0, 1.0, rng.uniform(-0.25, 1.25)])
    elevation = np.radians(rng.uniform(*ELEVATION) + rng.uniform(-5, 5, CONTEXT + 1))
    flat = np.cos(elevation)
    ring = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
    target = torch.tensor(LOOKED_AT).expand(CONTEXT + 1, 3)
    return target + DISTANCE * torch.from_numpy(ring.astype(np.float32)), target
