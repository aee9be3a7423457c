"""Where things can be pushed: MuJoCo's world, and what a model takes for it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from models.worlds.splats.mro_gwm import MroGwm, PushHistory
from training.envs.push_world import PushState, PushWorld, moved, within


class World(Protocol):
    """Somewhere that things can be pushed."""

    apart: float
    "Metres that who says where things are disagrees, 0 of who knows."

    def begin(self, state: PushState) -> None: ...

    def step(self, action: Float[ndarray, " 2"]) -> PushState: ...


class TrueWorld:
    """MuJoCo's."""

    apart = 0.0

    def begin(self, state: PushState) -> None:
        self.world = PushWorld(state)

    def step(self, action: Float[ndarray, " 2"]) -> PushState:
        return self.world.step(action)


class LearnedWorld:
    """A model's, in the mean of its members."""

    def __init__(self, model: MroGwm) -> None:
        self.model, self.device = model, model.anchors.device
        self.apart = 0.0

    def begin(self, state: PushState) -> None:
        times = self.model.config.history
        poses, pusher = (
            torch.from_numpy(np.float32(x)).to(self.device) for x in (state.poses, state.pusher)
        )
        self.seen = PushHistory(poses.expand(1, times, *poses.shape), pusher.expand(1, times, 2))
        self.apart = 0.0

    @torch.no_grad()
    def step(self, action: Float[ndarray, " 2"]) -> PushState:
        done = within(np.asarray(action)).astype(np.float32)
        pusher = moved(self.seen.pusher[0, -1].cpu().numpy(), done).astype(np.float32)
        given = (torch.from_numpy(x).to(self.device)[None] for x in (done, pusher))
        actions, there = given
        told, apart_ = self.model.imagine(self.seen, actions[:, None], there[:, None])
        self.seen = self.seen.then(told[:, 0], there)
        self.apart = float(apart_.max())
        return PushState(told[0, 0].double().cpu().numpy(), pusher.astype(np.float64))
