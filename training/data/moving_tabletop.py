"""A table whose things move, ray-traced: see training/envs/moving_tabletop.py.

Some cameras are held out at all times, and some times are in all cameras. Depth, ids, and where
every point of every thing is at any time are exact.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from training.data.config_scenes import MovingTabletopConfig
from training.data.posed import Posed
from training.data.tabletop import HEIGHT, device_of_tracing
from training.data.timed import TimedData
from training.envs.moving_tabletop import HOP, moving_tabletop
from training.envs.ray_tracer import intrinsics, render
from training.envs.tabletop import FOCAL, RADIUS, cameras_around
from training.seeding import numpy_rng

CHANGED = 0.1
"Difference of a colour between two times beyond which a pixel has changed."


class MovingTabletopData(TimedData[MovingTabletopConfig]):
    """Traced when it is opened, on a GPU if there is one: about two seconds for a hundred images of
    48 x 48 on one core."""

    def __init__(
        self, config: MovingTabletopConfig, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.table = moving_tabletop(numpy_rng(seed, "data/scene"), config.things)
        self.background = self.table.home.background
        viewmats = [
            cameras_around(numpy_rng(seed, f"data/cameras/{part}"), count)
            for part, count in (("train", config.cameras), ("heldout", config.heldout))
        ]
        everything = self.traced(torch.cat(viewmats))
        frame, camera = np.divmod(np.arange(len(everything.names)), sum(map(len, viewmats)))
        between = frame % config.heldout_every == config.heldout_every // 2
        told = (camera < config.cameras) & ~between
        self.train, self.heldout = everything.some(told), everything.some(~told)
        wide = 1.1 * RADIUS
        self.box = np.array([[-wide, -wide, -0.1], [wide, wide, HEIGHT + HOP]], np.float32)

    def traced(self, viewmats: Tensor) -> Posed:
        """All times of all cameras, time after time."""
        config, device = self.config, device_of_tracing()
        size, cameras = config.image_size, len(viewmats)
        Ks = intrinsics(FOCAL * size, size, size).expand(cameras, 3, 3)
        times = np.linspace(0, 1, config.times, dtype=np.float32)
        found = [
            render(self.table.at(float(time)), viewmats.to(device), Ks.to(device), size, size,
                   config.samples)
            for time in times
        ]  # fmt: skip
        images, depths, ids = (
            torch.stack([getattr(views, name) for views in found]).cpu().numpy()
            for name in ("color", "depth", "id")
        )
        changing = np.ptp(images, axis=0).max(-1) > CHANGED  # [cameras h w]
        names = (f"{t:03}/{c:03}" for t in range(config.times) for c in range(cameras))
        return Posed(
            images.reshape(-1, size, size, 3),
            np.tile(viewmats.numpy(), (config.times, 1, 1)),
            np.tile(Ks.numpy(), (config.times, 1, 1)),
            tuple(names),
            depths.reshape(-1, size, size),
            ids.reshape(-1, size, size),
            times=np.repeat(times, cameras),
            changing=np.tile(changing, (config.times, 1, 1)),
        )

    @property
    def things(self) -> int:
        return self.config.things

    def carried(
        self, points: Float32[np.ndarray, "n 3"], id: int, time: float
    ) -> Float32[np.ndarray, "n 3"]:
        return self.table.carried(points, id, time).astype(np.float32)
