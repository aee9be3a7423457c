"""Walks through a world, cut into windows: states, and blocks of the actions between them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32

from training.data.config_worlds import WalksConfig
from training.data.generated import GeneratedData

Config = TypeVar("Config", bound=WalksConfig)


class Walks(NamedTuple):
    """[n, t, s] states, [n, t-1, a] actions; in a window [n, b, skip a], normalised."""

    states: Float32[np.ndarray, "n t s"]
    actions: Float32[np.ndarray, "n t-1 a"]


class WalksData(GeneratedData[Config]):
    """What is common to worlds: a window has every `data.skip`th state of a walk.

    Between two of them is a block of `data.skip` actions, with mean 0 and standard deviation 1, as
    plans are made of them.

    Args:
        sample: walks that the actions' mean and deviation are taken from, whatever the seed.
    Attributes:
        action_mean, action_std: of each component.
    """

    item = "window"

    def __init__(
        self, config: Config, *, seed: int, rank: int = 0, world: int = 1, sample: Walks
    ) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.action_mean = sample.actions.mean(axis=(0, 1))
        self.action_std = sample.actions.std(axis=(0, 1))

    @property
    def block(self) -> int:
        """Components of a block of actions."""
        return self.config.skip * len(self.action_mean)

    def shown(self, step: int) -> tuple[Walks, np.random.Generator]:
        """The walks of a step, one per window, and what says where windows begin."""
        raise NotImplementedError

    def heldout(self, count: int) -> Walks:
        """Whole walks that are never trained on, the same for every model of the seed."""
        raise NotImplementedError

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`states` [b, T, s] and `actions` [b, T-1, skip a] of this process's windows."""
        walks, rng = self.shown(step)
        windows = self.windows(
            walks, rng.integers(self.config.walk - self.reach, size=len(walks[0]))
        )
        return {name: self.mine(rows) for name, rows in windows._asdict().items()}

    @property
    def reach(self) -> int:
        """Steps from the first state of a window to its last."""
        return self.config.skip * (self.config.seq_len - 1)

    def windows(self, walks: Walks, first: np.ndarray) -> Walks:
        """One window of each walk, from its state `first` on."""
        rows, skip = np.arange(len(first))[:, None], self.config.skip
        seen = walks.states[rows, first[:, None] + np.arange(0, self.reach + 1, skip)]
        done = walks.actions[rows, first[:, None] + np.arange(self.reach)]
        return Walks(seen, self.blocks(done))

    def blocks(self, actions: Float32[np.ndarray, "n t a"]) -> Float32[np.ndarray, "n b k"]:
        """Normalised actions, data.skip of them in a row."""
        normal = (actions - self.action_mean) / self.action_std
        return normal.reshape(len(actions), -1, self.block)
