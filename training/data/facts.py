"""Fact documents: keys with values, then questions. What a memory of the document must recall.

    begin  k_1 v_1  k_2 v_2 ... k_n v_n   k_a v_a  k_b v_b ...
           n facts, keys all distinct     questions: a key of the facts, then its value

Keys, values and questions are drawn anew for every document, so no answer can be known but from the
document. It is the multi-query associative recall of Zoology: Measuring and Improving Recall in
Efficient Language Models, 2024, arXiv:2312.04927, with questions after all facts; a state of fixed
size must fail at it once there are more facts than it can hold.

Everything is a function of (seed, stream, step): nothing is stored to resume.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from training.data.config import FactsConfig
from training.data.corpus import DataError
from training.data.order import rank_slice
from training.seeding import numpy_rng


class FactsData:
    """Batches and held-out documents.

    Args:
        seed: of the run; its `data/facts` stream gives the batches, `eval/facts` the held-out
            documents.
    Raises:
        DataError: data.batch_size does not divide over the processes.
    """

    def __init__(self, config: FactsConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        if config.batch_size % world:
            raise DataError(
                f"data.batch_size={config.batch_size} does not divide over {world} processes: "
                "make it a multiple of them"
            )
        self.config, self._seed, self._rank, self._world = config, seed, rank, world

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def content_hash(self) -> str:
        """Of what decides the documents, the seed apart."""
        return hashlib.sha256(json.dumps(asdict(self.config)).encode()).hexdigest()

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's documents of the batch of `step`, all with the same number of facts.

        Returns:
            `tokens` int32 [b, seq_len + 1] and `weight` float32 [b, seq_len], of each next token.
        """
        rng = numpy_rng(self._seed, "data/facts", step)
        facts = int(rng.choice(self.config.facts))
        tokens = documents(self.config, rng, self.config.batch_size, facts)
        weight = np.where(answers(self.config, facts), 1.0, self.config.context_weight)
        rows = np.broadcast_to(weight.astype(np.float32), (len(tokens), self.config.seq_len))
        return {
            "tokens": rank_slice(tokens, self._rank, self._world),
            "weight": rank_slice(rows, self._rank, self._world).copy(),
        }

    def ids(self, step: int) -> list[str]:
        """Names of the batch's documents, for messages."""
        rows = rank_slice(np.arange(self.config.batch_size), self._rank, self._world)
        return [f"document {row} of step {step}" for row in rows]

    def heldout(self, count: int, facts: int) -> Int32[np.ndarray, "n t+1"]:
        """Fresh documents with so many facts, the same for every model of the seed."""
        return documents(self.config, numpy_rng(self._seed, "eval/facts", facts), count, facts)

    def describe(self) -> dict[str, Any]:
        """JSON-able facts, for a run's records."""
        return asdict(self.config)


def documents(
    config: FactsConfig, rng: np.random.Generator, count: int, facts: int
) -> Int32[np.ndarray, "n t+1"]:
    """`count` documents of seq_len + 1 tokens with so many facts; questions fill the rest."""
    questions = config.seq_len // 2 - facts
    keys = 1 + rng.random((count, config.keys)).argsort(axis=1)[:, :facts]
    values = 1 + config.keys + rng.integers(config.values, size=(count, facts))
    asked = rng.integers(facts, size=(count, questions))
    order = np.concatenate([np.tile(np.arange(facts), (count, 1)), asked], axis=1)
    pairs = np.stack([np.take_along_axis(x, order, axis=1) for x in (keys, values)], axis=-1)
    tokens = np.zeros((count, config.seq_len + 1), np.int32)  # 0 begins the document
    tokens[:, 1:] = pairs.reshape(count, -1)
    return tokens


def answers(config: FactsConfig, facts: int) -> Bool[np.ndarray, " t"]:
    """Which predictions are answers: those of a value, after the facts."""
    position = np.arange(config.seq_len)
    return (position % 2 == 1) & (position >= 2 * facts)
