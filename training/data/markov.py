"""Documents from worlds of their own: each draws a fresh Markov chain, and the best loss is known.

What is learned from a document helps in that document only, so a model must learn while it reads.
`markov` data has two kinds of worlds, and for both the loss of the best possible predictor, which
knows everything but the document's table, is computed exactly at every position:

    successors   each context has s of V successors, drawn without replacement, equally likely.
                 After r of them were seen, each of those has probability 1/s, any other token
                 (1 - r/s) / (V - r).
    dirichlet    each context's distribution is drawn from Dirichlet(alpha V m), m uniform or Zipf.
                 After n visits with n_a to token a: (n_a + alpha V m_a) / (n + alpha V).

A context is the last `order` tokens. With `switch_every` the table is drawn anew at every multiple
of that many predictions, which the best predictor knows.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32, Int64

from training.data.config import MarkovConfig, MarkovKind
from training.data.generated import GeneratedTokens
from training.seeding import numpy_rng


class MarkovData(GeneratedTokens[MarkovConfig]):
    """Batches and held-out documents, each document with a world of its own.

    The seed's `data/markov` stream gives the batches, `eval/markov` the held-out documents.
    """

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """{"tokens": int32 [b, seq_len + 1]}, this process's documents of the batch of `step`."""
        size, rng = self.config.batch_size, numpy_rng(self._seed, "data/markov", step)
        return {"tokens": self.mine(documents(self.config, rng, size, self.config.seq_len))}

    def heldout_sequences(self, count: int, length: int) -> dict[str, np.ndarray]:
        """Fresh documents and their floor, the same for every model of the seed.

        Returns:
            `tokens` int32 [count, length + 1] and `floor` float32 [count, length]: nats of each
            next token under the best possible predictor.
        """
        tokens = documents(self.config, numpy_rng(self._seed, "eval/markov", length), count, length)
        return {"tokens": tokens, "floor": bayes_losses(self.config, tokens)}


def documents(
    config: MarkovConfig, rng: np.random.Generator, count: int, length: int
) -> Int32[np.ndarray, "n t+1"]:
    """`count` documents of length + 1 tokens, each from tables of its own."""
    v, order, every = config.vocab_size, config.order, config.switch_every or length
    rows = np.arange(count)
    tokens = np.empty((count, length + 1), np.int32)
    tokens[:, :order] = rng.integers(v, size=(count, min(order, length + 1)))
    uniform = rng.random((count, length))
    table = np.empty(0)
    for t in range(length):  # position t predicts token t + 1
        if t % every == 0:
            table = draw_tables(config, rng, count)
        if t + 1 < order:
            continue  # one of the initial tokens
        # [n, s] successors, or [n, V] cumulative probabilities
        drawn = table[rows, context_at(config, tokens, t)]
        if config.kind == MarkovKind.successors:
            tokens[:, t + 1] = drawn[rows, (uniform[:, t] * config.successors).astype(np.int64)]
        else:
            tokens[:, t + 1] = np.minimum((drawn <= uniform[:, t, None]).sum(axis=1), v - 1)
    return tokens


def draw_tables(config: MarkovConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """[n, V**order, s] distinct successors, or [n, V**order, V] cumulative probabilities."""
    v, contexts = config.vocab_size, config.vocab_size**config.order
    if config.kind == MarkovKind.dirichlet:
        shares = rng.standard_gamma(concentration(config), size=(count, contexts, v))
        total = np.maximum(shares.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
        return np.cumsum(shares / total, axis=-1)
    table = rng.integers(v, size=(count, contexts, config.successors), dtype=np.int32)
    for place in range(1, config.successors):  # draw again whatever repeats an earlier successor
        while True:
            repeats = (table[..., :place] == table[..., place, None]).any(axis=-1)
            if not repeats.any():
                break
            table[..., place][repeats] = rng.integers(v, size=int(repeats.sum()), dtype=np.int32)
    return table


def concentration(config: MarkovConfig) -> np.ndarray:
    """[V] Dirichlet parameters alpha V m_a, with m_a proportional to (a + 1) ** -zipf."""
    weight = np.arange(1, config.vocab_size + 1) ** -config.zipf
    return config.alpha * config.vocab_size * weight / weight.sum()


def bayes_losses(
    config: MarkovConfig, tokens: Int32[np.ndarray, "n t+1"], reach: int | None = None
) -> Float32[np.ndarray, "n t"]:
    """Nats of each next token under the exact posterior predictive. No model can be better.

    Args:
        reach: tokens up to the current one that the predictor can see, at least data.order: what no
            model that sees only these can beat. None: the whole document.
    """
    count, length = tokens.shape[0], tokens.shape[1] - 1
    v, order, s = config.vocab_size, config.order, config.successors
    every, rows = config.switch_every or length, np.arange(count)
    reach = length if reach is None else reach
    if reach < order:
        raise ValueError(f"reach={reach} does not hold the context of {order} tokens")
    losses = np.full((count, length), np.log(v), np.float32)
    visits = np.zeros((count, v**order, v), np.int32)
    prior, first = concentration(config), 0
    for t in range(length):
        if t % every == 0:
            visits[:], first = 0, t
        if t + 1 < order:
            continue  # an initial token is uniform
        lost = t - reach + order - 1  # the last prediction whose context is not seen whole
        if lost >= max(first, order - 1):
            visits[rows, context_at(config, tokens, lost), tokens[:, lost + 1]] -= 1
        context, target = context_at(config, tokens, t), tokens[:, t + 1]
        seen = visits[rows, context]  # [n, V]
        if config.kind == MarkovKind.successors:
            known, distinct = seen[rows, target] > 0, (seen > 0).sum(axis=1)
            unseen = np.where(distinct < s, (1 - distinct / s) / np.maximum(v - distinct, 1), 1.0)
            probability = np.where(known, 1 / s, unseen)
        else:
            probability = (seen[rows, target] + prior[target]) / (seen.sum(axis=1) + prior.sum())
        losses[:, t] = -np.log(probability)
        visits[rows, context, target] += 1
    return losses


def context_at(
    config: MarkovConfig, tokens: Int32[np.ndarray, "n t+1"], position: int
) -> Int64[np.ndarray, " n"]:
    """The last `order` tokens up to a position, as one number."""
    context = np.zeros(len(tokens), np.int64)
    for age in range(config.order):
        context = context * config.vocab_size + tokens[:, position - age]
    return context
