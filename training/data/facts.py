"""Fact documents: keys with values, then questions. What a memory of the document must recall.

    begin  k_1 v_1  k_2 v_2 ... k_n v_n   k_a v_a  k_b v_b ...
           n facts, keys all distinct     questions: a key of the facts, then its value

Keys, values and questions are drawn anew for every document, so no answer can be known but from the
document. It is the multi-query associative recall of Zoology: Measuring and Improving Recall in
Efficient Language Models, 2024, arXiv:2312.04927, with questions after all facts; a state of fixed
size must fail at it once there are more facts than it can hold.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int32

from training.data.config import FactsConfig
from training.data.generated import GeneratedTokens
from training.seeding import numpy_rng


class FactsData(GeneratedTokens[FactsConfig]):
    """Batches and held-out documents.

    The seed's `data/facts` stream gives the batches, `eval/facts` the held-out documents.
    """

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
        return {"tokens": self.mine(tokens), "weight": self.mine(rows).copy()}

    def heldout(self, count: int, facts: int) -> Int32[np.ndarray, "n t+1"]:
        """Fresh documents with so many facts, the same for every model of the seed."""
        return documents(self.config, numpy_rng(self._seed, "eval/facts", facts), count, facts)


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
