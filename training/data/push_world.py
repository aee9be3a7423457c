"""Episodes of pushing: see training/envs/push_world.py. `data=push_world`.

Episode number i of a seed's stream is the same however many there are. A window is a number of
states that follow each other and the actions between, turned about the middle of the table by any
angle: the table is round.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from training.data.config_scenes import PushWorldConfig
from training.data.corpus import DataError
from training.envs.push_world import placed, pushes
from training.seeding import numpy_rng

STILL = 0.01
"Metres that a thing must go within a window to have moved."


@dataclass(frozen=True)
class Episodes:
    """What was seen and done."""

    poses: Float32[np.ndarray, "e t m 7"]
    "Positions and quaternions wxyz of things."
    pusher: Float32[np.ndarray, "e t 2"]
    actions: Float32[np.ndarray, "e s 2"]
    "No longer than 1; one fewer than states."

    def windows(self, rows: np.ndarray, starts: np.ndarray, length: int) -> Episodes:
        """States `length` in number from each start."""
        at = starts[:, None] + np.arange(length)
        e = rows[:, None]
        return Episodes(self.poses[e, at], self.pusher[e, at], self.actions[e, at[:, :-1]])

    def turned(self, angles: np.ndarray) -> Episodes:
        """About the middle of the table, each by an angle."""
        c, s = np.cos(angles), np.sin(angles)
        R = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)  # [e 2 2]
        poses, half = self.poses.copy(), angles[:, None, None] / 2
        poses[..., :2] = np.einsum("eij,etmj->etmi", R, self.poses[..., :2])
        a, b = np.cos(half), np.sin(half)  # the quaternion (a, 0, 0, b), from the left
        w, x, y, z = np.moveaxis(self.poses[..., 3:], -1, 0)
        poses[..., 3:] = np.stack([a * w - b * z, a * x - b * y, a * y + b * x, a * z + b * w], -1)
        return Episodes(
            poses.astype(np.float32),
            np.einsum("eij,etj->eti", R, self.pusher).astype(np.float32),
            np.einsum("eij,etj->eti", R, self.actions).astype(np.float32),
        )


class PushWorldData:
    """Made when it is opened: about twenty milliseconds an episode."""

    def __init__(
        self,
        config: PushWorldConfig,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        length: int = 6,
    ) -> None:
        """
        Args:
            length: states of a window.
        Raises:
            DataError: MuJoCo is not installed.
        """
        try:
            import mujoco  # noqa: F401
        except ImportError:
            raise DataError(
                'data=push_world needs MuJoCo: pip install "afferent[physics]"'
            ) from None
        self.config, self.seed, self.rank, self.world = config, seed, rank, world
        self.length = length
        self.train = self.made("train", config.episodes)
        self.heldout = self.made("heldout", config.heldout)
        moves = self.moves()
        self.places = {kind: np.argwhere(moves == kind) for kind in (True, False)}

    def made(self, part: str, count: int) -> Episodes:
        """So many of a stream."""
        found = []
        for i in range(count):
            rng = numpy_rng(self.seed, f"data/push_world/{part}", i)
            found.append(pushes(rng, placed(rng), self.config.steps))
        return Episodes(
            np.array([[s.poses for s in states] for states, _ in found], np.float32),
            np.array([[s.pusher for s in states] for states, _ in found], np.float32),
            np.array([actions for _, actions in found], np.float32),
        )

    def moves(self) -> np.ndarray:
        """[e, starts]: whether something moves in a window of the training episodes."""
        places, length = self.train.poses[..., :2], self.length
        gone = [
            np.linalg.norm(places[:, s : s + length] - places[:, s : s + 1], axis=-1).max((1, 2))
            for s in range(places.shape[1] - length + 1)
        ]
        return np.stack(gone, axis=1) > STILL

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Windows, as many of which as configured have something that moves."""
        rng, size = numpy_rng(self.seed, "data/push_world/windows", step), self.config.batch_size
        moving = rng.uniform(size=size) < self.config.moving
        chosen = np.empty((size, 2), np.int64)
        for kind, wanted in ((True, moving), (False, ~moving)):
            there = self.places[kind] if len(self.places[kind]) else self.places[not kind]
            chosen[wanted] = there[rng.integers(len(there), size=int(wanted.sum()))]
        windows = self.train.windows(chosen[:, 0], chosen[:, 1], self.length)
        windows = windows.turned(rng.uniform(0, 2 * math.pi, size))
        whose = rng.permutation(size) if self.config.shuffled_pushers else np.arange(size)
        mine = slice(self.rank, None, self.world)
        return {"poses": windows.poses[mine], "pusher": windows.pusher[whose][mine],
                "actions": windows.actions[whose][mine]}  # fmt: skip

    def ids(self, step: int) -> list[str]:
        return [f"windows of step {step}"]

    @property
    def content_hash(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.heldout):
            for x in (part.poses, part.pusher, part.actions):
                found.update(np.ascontiguousarray(x))
        return found.hexdigest()
