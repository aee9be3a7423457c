"""Walks through two rooms in colour: someone who knows the way, and stumbles.

The data of LeWorldModel (2026, arXiv:2603.19312): at each of `data.walk` steps the action leads
towards a goal, by the door if that is in the other room; then comes noise twice as large as the
largest action, and both are clipped to [-1, 1]. One action in twenty is the one before. A goal that
was reached is followed by another (the original begins anew). A window has every `data.skip`th
state, and between two of them a block of `data.skip` actions.

Actions are handed out with mean 0 and standard deviation 1, as plans are made of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32

from training.data.config_worlds import TwoRoomsRGBConfig
from training.data.generated import GeneratedData
from training.envs.two_rooms_rgb import LEAST, LEFT, MOST, RIGHT, move, towards
from training.seeding import numpy_rng

NOISE, REPEAT, ARRIVED = 2.0, 0.05, 10.5
SAMPLE = 512  # walks that the actions' mean and deviation are taken from


class Walks(NamedTuple):
    """[n, t, 2] positions in canvas pixels, [n, t-1, 2] actions in [-1, 1]."""

    positions: Float32[np.ndarray, "n t 2"]
    actions: Float32[np.ndarray, "n t-1 2"]


class TwoRoomsRGBData(GeneratedData[TwoRoomsRGBConfig]):
    """The seed's `data/two_rooms_rgb` stream gives training windows, `eval/two_rooms_rgb` others.

    Attributes:
        action_mean, action_std: of each component; the same whatever the seed.
    """

    item = "window"

    def __init__(
        self, config: TwoRoomsRGBConfig, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        sample = walk(numpy_rng(0, "data/two_rooms_rgb/actions"), SAMPLE, config.walk).actions
        self.action_mean, self.action_std = sample.mean(axis=(0, 1)), sample.std(axis=(0, 1))

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`positions` [b, T, 2] and `actions` [b, T-1, skip * 2] of this process's windows."""
        config = self.config
        rng = numpy_rng(self._seed, "data/two_rooms_rgb", step)
        walks = walk(rng, config.batch_size, config.walk)
        reach = config.skip * (config.seq_len - 1)
        first = rng.integers(config.walk - reach, size=config.batch_size)
        return {
            name: self.mine(rows) for name, rows in self.windows(walks, first)._asdict().items()
        }

    def windows(self, walks: Walks, first: np.ndarray) -> Walks:
        """One window of each walk, from its state `first` on; actions in blocks, normalised."""
        config, rows = self.config, np.arange(len(first))[:, None]
        reach = config.skip * (config.seq_len - 1)
        seen = walks.positions[rows, first[:, None] + np.arange(0, reach + 1, config.skip)]
        done = walks.actions[rows, first[:, None] + np.arange(reach)]
        return Walks(seen, self.blocks(done))

    def blocks(self, actions: Float32[np.ndarray, "n t 2"]) -> Float32[np.ndarray, "n b k"]:
        """Normalised actions, data.skip of them in a row."""
        normal = (actions - self.action_mean) / self.action_std
        return normal.reshape(len(actions), -1, 2 * self.config.skip)

    def heldout(self, count: int) -> Walks:
        """Whole walks, the same for every model of the seed."""
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
