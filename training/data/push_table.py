"""The table of PushWorld3D, ray-traced before anything is pushed: what its world is made of."""

from __future__ import annotations

import numpy as np

from training.data.config_scenes import PushTableConfig
from training.data.tabletop import TabletopData
from training.envs.push_world import PushState, placed, push_scene
from training.envs.ray_tracer import Scene


class PushTableData(TabletopData):
    """`state` is where things stand."""

    config: PushTableConfig
    state: PushState

    def arranged(self, rng: np.random.Generator) -> Scene:
        self.state = placed(rng)
        return push_scene(self.state)
