"""A table with things on it, ray-traced: see training/envs/tabletop.py. Depth and ids are exact."""

from __future__ import annotations

import numpy as np

from training.data.config_scenes import TabletopConfig
from training.data.posed import Posed, PosedData
from training.envs.ray_tracer import intrinsics, render
from training.envs.tabletop import FOCAL, RADIUS, cameras_around, tabletop
from training.seeding import numpy_rng

HEIGHT = 0.7  # of things, at most


class TabletopData(PosedData[TabletopConfig]):
    """Traced when it is opened: about a second for ten images of 64 x 64 on one core."""

    def __init__(self, config: TabletopConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.scene = tabletop(numpy_rng(seed, "data/scene"), config.things)
        self.background = self.scene.background
        self.train = self.seen("train", config.views)
        self.heldout = self.seen("heldout", config.heldout)
        wide = 1.1 * RADIUS
        self.box = np.array([[-wide, -wide, -0.1], [wide, wide, HEIGHT]], np.float32)

    def seen(self, part: str, count: int) -> Posed:
        """From cameras of their own."""
        config = self.config
        viewmats = cameras_around(numpy_rng(self.seed, f"data/cameras/{part}"), count)
        size = config.image_size
        Ks = intrinsics(FOCAL * size, size, size).expand(count, 3, 3)
        found = render(self.scene, viewmats, Ks, size, size, config.samples)
        arrays = (x.numpy() for x in (found.color, viewmats, Ks.contiguous()))
        names = tuple(f"{part}/{number:03}" for number in range(count))
        return Posed(*arrays, names, found.depth.numpy(), found.id.numpy())
