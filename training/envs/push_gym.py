"""PushWorld3D for agents: the interface of gymnasium, over the true world or a learned one.

    env = PushEnv(TrueWorld())              MuJoCo
    env = PushEnv(LearnedWorld(model))      what a model says, from the same beginnings

An agent pushes the T to where it should be.

    action        the pusher's velocity, [-1, 1]^2; longer ones are cut to 1
    observation   {"state": [27] poses of three things, pusher, and where T should be: x, y, cos,
                  sin of its angle, "image": [h, w, 3] uint8, if somebody draws}
    reward        how much nearer the T's points came to where they should be, in metres; 1 more
                  where they are within NEAR, which ends the episode
    info          "distance" that is left, and "apart" of a learned world: how far members disagree
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from training.envs.push_goals import NEAR, T, apart, drawn
from training.envs.push_world import THINGS, PushState
from training.envs.push_worlds import World

STATE = 7 * THINGS + 2 + 4

Draw = Callable[[PushState], ndarray]
"From a state to an image [h, w, 3] uint8."


class PushEnv(gymnasium.Env):
    """Push the T to where it should be."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, world: World, anchors: Float[ndarray, "m a 3"], draw: Draw | None = None):
        """
        Args:
            anchors: points of each thing in its own frame.
            draw: what an image is made by; None: observations have none.
        """
        self.world, self.anchors, self.draw = world, torch.from_numpy(np.float32(anchors)), draw
        box = gymnasium.spaces.Box
        spaces: dict[str, Any] = {"state": box(-np.inf, np.inf, (STATE,), np.float32)}
        if draw is not None:
            image = draw(drawn(np.random.default_rng(0))[0])
            spaces["image"] = box(0, 255, image.shape, np.uint8)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, ndarray], dict[str, Any]]:
        """Things anywhere, and where the T should be."""
        super().reset(seed=seed)
        self.state, self.goal = drawn(self.np_random)
        self.world.begin(self.state)
        self.left = self.distance()
        return self.observation(), {"distance": self.left}

    def step(
        self, action: Float[ndarray, " 2"]
    ) -> tuple[dict[str, ndarray], float, bool, bool, dict[str, Any]]:
        """A tenth of a second. Raises ValueError for an action of another shape."""
        given = np.asarray(action, np.float64)
        if given.shape != (2,) or not np.isfinite(given).all():
            raise ValueError(f"action={action!r} must be two finite numbers from -1 to 1")
        before, self.state = self.left, self.world.step(given)
        self.left = self.distance()
        there = self.left < NEAR
        info = {"distance": self.left, "apart": self.world.apart}
        return self.observation(), before - self.left + there, there, False, info

    def distance(self) -> float:
        """Mean, of the T's points to where they should be."""
        poses = (torch.from_numpy(np.float32(x)) for x in (self.state.poses[T], self.goal))
        return float(apart(*poses, self.anchors))

    def observation(self) -> dict[str, ndarray]:
        w, z = self.goal[3], self.goal[6]
        should = [*self.goal[:2], w * w - z * z, 2 * w * z]
        state = np.concatenate([self.state.poses.ravel(), self.state.pusher, should])
        found = {"state": state.astype(np.float32)}
        return found | ({"image": self.draw(self.state)} if self.draw else {})

    def render(self) -> ndarray:
        """[h, w, 3] uint8. Raises ValueError if nobody draws."""
        if self.draw is None:
            raise ValueError("this environment was made without draw=, which images are made by")
        return self.draw(self.state)
