"""What data that is generated from (seed, stream, step) shares: nothing is stored to resume."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import numpy as np

from training.data.config import DataConfig
from training.data.corpus import DataError
from training.data.order import rank_slice

Config = TypeVar("Config", bound=DataConfig)  # with `batch_size`


class GeneratedData(Generic[Config]):
    """One process's part of batches that every process could generate whole.

    Args:
        seed: of the run.
        rank: this process, in [0, world).
        world: number of processes that share a batch.
    Raises:
        DataError: data.batch_size does not divide over the processes.
    """

    item = "document"  # what a row of a batch is, for messages

    def __init__(self, config: Config, *, seed: int, rank: int = 0, world: int = 1) -> None:
        if config.batch_size % world:
            raise DataError(
                f"data.batch_size={config.batch_size} does not divide over {world} processes: "
                "make it a multiple of them"
            )
        self.config: Config = config
        self._seed, self._rank, self._world = seed, rank, world

    @property
    def content_hash(self) -> str:
        """Of what decides the documents, the seed apart."""
        return hashlib.sha256(json.dumps(asdict(self.config)).encode()).hexdigest()

    def mine(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows of a batch."""
        return rank_slice(rows, self._rank, self._world)

    def ids(self, step: int) -> list[str]:
        """Names of the batch's rows, for messages."""
        rows = self.mine(np.arange(self.config.batch_size))
        return [f"{self.item} {row} of step {step}" for row in rows]

    def describe(self) -> dict[str, Any]:
        """JSON-able facts, for a run's records."""
        return asdict(self.config)


class GeneratedTokens(GeneratedData[Config]):
    """Documents made of token ids."""

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size
