"""A table with things on it, ray-traced: see training/envs/tabletop.py. Depth and ids are exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.worlds.splats.gaussian_splatting import exponential
from training.data.config_scenes import TabletopConfig
from training.data.posed import Posed, PosedData
from training.envs.ray_tracer import Scene, intrinsics, render
from training.envs.tabletop import FOCAL, RADIUS, cameras_around, tabletop
from training.seeding import numpy_rng

HEIGHT = 0.7  # of things, at most


def device_of_tracing() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TabletopData(PosedData[TabletopConfig]):
    """Traced when it is opened, on a GPU if there is one: about a second for ten images of 64 x 64
    on one core."""

    def __init__(self, config: TabletopConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.scene = self.arranged(numpy_rng(seed, "data/scene"))
        self.background = self.scene.background
        self.train = self.doubted(self.seen("train", config.views))
        self.heldout = self.seen("heldout", config.heldout)
        if config.exposure_noise:
            self.darken(config.exposure_noise)
        wide = 1.1 * RADIUS
        self.box = np.array([[-wide, -wide, -0.1], [wide, wide, HEIGHT]], np.float32)

    def arranged(self, rng: np.random.Generator) -> Scene:
        """The things, on the table."""
        return tabletop(rng, self.config.things)

    def seen(self, part: str, count: int) -> Posed:
        """From cameras of their own."""
        viewmats = cameras_around(numpy_rng(self.seed, f"data/cameras/{part}"), count)
        return self.traced(self.scene, viewmats, part)

    def traced(self, scene: Scene, viewmats: Tensor, part: str) -> Posed:
        size, count = self.config.image_size, len(viewmats)
        Ks = intrinsics(FOCAL * size, size, size).expand(count, 3, 3)
        device = device_of_tracing()
        given = viewmats.to(device), Ks.to(device)
        found = render(scene, *given, size, size, self.config.samples)
        arrays = (x.cpu().numpy() for x in (found.color, viewmats, Ks.contiguous()))
        names = tuple(f"{part}/{number:03}" for number in range(count))
        return Posed(*arrays, names, found.depth.cpu().numpy(), found.id.cpu().numpy())

    @property
    def things(self) -> int:
        return self.config.things

    def without(self, id: int) -> Posed:
        viewmats = torch.from_numpy(self.heldout.viewmats)
        found = self.traced(self.scene.without(id), viewmats, "heldout")
        return replace(found, images=found.images * np.float32(1 - self.config.exposure_noise))

    def doubted(self, posed: Posed) -> Posed:
        """Its cameras said to be elsewhere, by as much as is configured."""
        noise = self.config.pose_noise
        if not noise:
            return posed
        rng = numpy_rng(self.seed, "data/doubt")
        twists = torch.from_numpy(rng.normal(scale=noise, size=(len(posed.names), 6)))
        wrong = exponential(twists) @ torch.from_numpy(posed.viewmats).double()
        said = wrong.numpy().astype(np.float32)
        return replace(posed, viewmats=said, true_viewmats=posed.viewmats)

    def darken(self, noise: float) -> None:
        """Images in different light; those held out in the mean of it."""
        rng = numpy_rng(self.seed, "data/light")
        light = rng.uniform(1 - 2 * noise, 1, (len(self.train.names), 1, 1, 1)).astype(np.float32)
        self.train = replace(self.train, images=self.train.images * light)
        self.heldout = replace(self.heldout, images=self.heldout.images * np.float32(1 - noise))
