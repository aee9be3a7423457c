"""Walks through two rooms in colour: someone who knows the way, and stumbles.

The data of LeWorldModel (2026, arXiv:2603.19312): at each of `data.walk` steps the action leads
towards a goal, by the door if that is in the other room; then comes noise twice as large as the
largest action, and both are clipped to [-1, 1]. One action in twenty is the one before. A goal that
was reached is followed by another (the original begins anew).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32

from training.data.config_worlds import TwoRoomsRGBConfig
from training.data.walks import Walks, WalksData
from training.envs.two_rooms_rgb import LEAST, LEFT, MOST, RIGHT, move, towards
from training.seeding import numpy_rng

NOISE, REPEAT, ARRIVED = 2.0, 0.05, 10.5
SAMPLE = 512  # walks that the actions' mean and deviation are taken from


class TwoRoomsRGBData(WalksData[TwoRoomsRGBConfig]):
    """The seed's `data/two_rooms_rgb` stream gives training walks, `eval/two_rooms_rgb` others."""

    def __init__(
        self, config: TwoRoomsRGBConfig, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        sample = walk(numpy_rng(0, "data/two_rooms_rgb/actions"), SAMPLE, config.walk)
        super().__init__(config, seed=seed, rank=rank, world=world, sample=sample)

    def shown(self, step: int) -> tuple[Walks, np.random.Generator]:
        rng = numpy_rng(self._seed, "data/two_rooms_rgb", step)
        return walk(rng, self.config.batch_size, self.config.walk), rng

    def heldout(self, count: int) -> Walks:
        return walk(numpy_rng(self._seed, "eval/two_rooms_rgb"), count, self.config.walk)


def free(rng: np.random.Generator, count: int) -> Float32[np.ndarray, "n 2"]:
    """Places where the dot has room, in either room."""
    points = rng.uniform(LEAST, MOST, (count, 2))
    while (bad := (points[:, 0] > LEFT) & (points[:, 0] < RIGHT)).any():
        points[bad] = rng.uniform(LEAST, MOST, (bad.sum(), 2))
    return points.astype(np.float32)


def walk(rng: np.random.Generator, count: int, states: int) -> Walks:
    """`count` walks of so many states."""
    position, goal = (torch.from_numpy(free(rng, count)) for _ in range(2))
    noise = NOISE * rng.standard_normal((states - 1, count, 2), np.float32)
    repeats = torch.from_numpy(rng.random((states - 1, count, 1)) < REPEAT)
    others = torch.from_numpy(free(rng, (states - 1) * count)).view(states - 1, count, 2)
    positions, actions = [position], []
    for step in range(states - 1):
        action = (towards(position, goal) + torch.from_numpy(noise[step])).clamp(-1, 1)
        if actions:
            action = torch.where(repeats[step], actions[-1], action)
        position = move(position, action)
        there = (position - goal).norm(dim=-1, keepdim=True) < ARRIVED
        goal = torch.where(there, others[step], goal)
        positions.append(position)
        actions.append(action)
    return Walks(torch.stack(positions, dim=1).numpy(), torch.stack(actions, dim=1).numpy())
