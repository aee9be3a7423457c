"""Images of a scene that moves, each with its time: at random, or one time after the other."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Int64

from training.data.config_scenes import TimedConfig
from training.data.order import visit
from training.data.posed import PosedData
from training.seeding import numpy_rng

Config = TypeVar("Config", bound=TimedConfig)


class TimedData(PosedData[Config]):
    """A subclass fills what one of `PosedData` does, with times."""

    @property
    def moments(self) -> Float32[np.ndarray, " t"]:
        """Times that are trained on, from the first."""
        return np.unique(self.times(self.train.times))

    def moment(self, step: int) -> int | None:
        """Which of these a step is about, if one comes after the other."""
        first, each = self.config.first_steps, self.config.steps_per_time
        if not each:
            return None
        return min(max(0, 1 + (step - first) // each), len(self.moments) - 1)

    def rows(self, step: int) -> Int64[np.ndarray, " b"]:
        moment = self.moment(step)
        if moment is None:
            return super().rows(step)
        there = np.flatnonzero(self.times(self.train.times) == self.moments[moment])
        size, seed = self.config.batch_size, self.seed + moment
        return there[visit(step * size, size, len(there), seed)][self.rank :: self.world]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        rows, times = self.rows(step), self.times(self.train.times)
        if self.config.shuffled_times:
            times = times[numpy_rng(self.seed, "data/shuffled_times").permutation(len(times))]
        return super().batch(step) | {"times": times[rows]}

    def carried(
        self, points: Float32[np.ndarray, "n 3"], id: int, time: float
    ) -> Float32[np.ndarray, "n 3"]:
        """Where points of a thing at the first time truly are at another."""
        raise NotImplementedError

    @property
    def content_hash(self) -> str:
        times = [self.times(part.times).tobytes() for part in (self.train, self.heldout)]
        whole = super().content_hash.encode() + b"".join(times)
        return hashlib.blake2b(whole, digest_size=16).hexdigest()

    @staticmethod
    def times(given: Float32[np.ndarray, " v"] | None) -> Any:
        assert given is not None, "a scene that moves has times"
        return given
