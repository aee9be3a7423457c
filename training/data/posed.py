"""Images with the cameras that saw them, for every step the same however often it is asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int64

from training.data.config_scenes import PosedConfig
from training.data.order import visit
from training.seeding import numpy_rng

Config = TypeVar("Config", bound=PosedConfig)


@dataclass(frozen=True)
class Posed:
    """Images and cameras; what is not known is None."""

    images: Float32[np.ndarray, "v h w 3"]
    "From 0 to 1, over the background."
    viewmats: Float32[np.ndarray, "v 4 4"]
    "World to camera: x to the right, y down, z forward."
    Ks: Float32[np.ndarray, "v 3 3"]
    names: tuple[str, ...]
    depths: Float32[np.ndarray, "v h w"] | None = None
    "Along z, infinite where nothing is."
    ids: Int64[np.ndarray, "v h w"] | None = None
    "Of the thing that is seen; -1 where nothing is."
    true_viewmats: Float32[np.ndarray, "v 4 4"] | None = None
    "Where what `viewmats` says is known to be wrong."
    times: Float32[np.ndarray, " v"] | None = None
    "From 0 to 1, of what moves."
    changing: Bool[np.ndarray, "v h w"] | None = None
    "Pixels that are not the same at all times."

    def some(self, which: np.ndarray) -> Posed:
        """Those of these numbers, or where this is true."""
        rows = np.arange(len(self.names))[which]
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "names"}
        chosen = {name: None if x is None else x[rows] for name, x in parts.items()}
        return Posed(names=tuple(self.names[row] for row in rows), **chosen)


@dataclass(frozen=True)
class Cloud:
    """Points that a scene is begun with."""

    points: Float32[np.ndarray, "n 3"]
    colors: Float32[np.ndarray, "n 3"]


class PosedData(Generic[Config]):
    """Batches of images in a shuffled order.

    A subclass fills `train`, `heldout`, `background`, `box` and, if it has one, `cloud`.
    """

    train: Posed
    heldout: Posed
    background: tuple[float, float, float]
    box: Float32[np.ndarray, "2 3"]
    "Lower and upper corner of what points are drawn in where there is no cloud."
    cloud: Cloud | None = None

    def __init__(self, config: Config, *, seed: int, rank: int = 0, world: int = 1) -> None:
        self.config, self.seed, self.rank, self.world = config, seed, rank, world

    def rows(self, step: int) -> Int64[np.ndarray, " b"]:
        """Numbers of the images of a step, this process's share."""
        size = self.config.batch_size
        return visit(step * size, size, len(self.train.names), self.seed)[self.rank :: self.world]

    @property
    def things(self) -> int:
        """How many there are that can be taken away; ids are from 1 on, 0 is where they stand."""
        return 0

    def without(self, id: int) -> Posed:
        """What the held-out cameras would see without a thing."""
        raise NotImplementedError

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rows, train = self.rows(step), self.train
        places = self.shuffle[rows] if self.config.shuffled else rows
        return {"rows": rows, "images": train.images[rows], "viewmats": train.viewmats[places],
                "Ks": train.Ks[rows]}  # fmt: skip

    @property
    def shuffle(self) -> Int64[np.ndarray, " v"]:
        """Whose camera each image is given if they are given those of others."""
        return numpy_rng(self.seed, "data/shuffled").permutation(len(self.train.names))

    def ids(self, step: int) -> list[str]:
        return [f"image {self.train.names[row]}" for row in self.rows(step)]

    @property
    def content_hash(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.heldout):
            for x in (part.images, part.viewmats, part.Ks):
                found.update(np.ascontiguousarray(x))
        return found.hexdigest()

    @property
    def extent(self) -> float:
        """How far cameras are from their middle, and a tenth: what lengths are measured in."""
        R, t = self.train.viewmats[:, :3, :3], self.train.viewmats[:, :3, 3]
        eyes = -np.einsum("vji,vj->vi", R, t)
        return 1.1 * float(np.linalg.norm(eyes - eyes.mean(0), axis=-1).max())
