"""Markov documents: their worlds are as described, and no predictor beats the exact loss."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
import pytest

from training.data.config import MarkovConfig, MarkovKind
from training.data.corpus import DataError
from training.data.markov import MarkovData, bayes_losses, concentration, documents

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def rng(seed: int = FRESH) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_each_context_has_its_successors_and_no_others() -> None:
    config = MarkovConfig(vocab_size=6, successors=2, order=2)
    tokens = documents(config, rng(), 5, 2000)
    for row in tokens:
        followers: dict[tuple[int, int], set[int]] = {}
        for a, b, c in zip(row, row[1:], row[2:], strict=False):
            followers.setdefault((a, b), set()).add(c)
        assert max(map(len, followers.values())) == 2
    counts = [len({tuple(pair) for pair in pairwise(row)}) for row in tokens]
    assert max(counts) > 6  # the second token of context matters


def test_every_document_has_a_world_of_its_own_and_successors_are_equally_likely() -> None:
    config = MarkovConfig(vocab_size=4, successors=2)
    tokens = documents(config, rng(), 400, 300)
    first = [frozenset(row[1:][row[:-1] == 0]) for row in tokens]
    drawn = {pair: first.count(frozenset(pair)) for pair in combinations(range(4), 2)}
    assert min(drawn.values()) > 25 and sum(drawn.values()) > 300  # some never come to token 0
    after = [row[1:][row[:-1] == 0] for row in tokens]
    shares = [np.mean(a == a.min()) for a in after if len(a) > 20]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)


def posterior_losses(config: MarkovConfig, row: np.ndarray) -> np.ndarray:
    """By enumeration of all tables: mean predictive probability, weighted by the likelihood."""
    subsets = list(combinations(range(config.vocab_size), config.successors))
    tables = [dict(enumerate(t)) for t in product(subsets, repeat=config.vocab_size)]
    weight, losses = np.ones(len(tables)), []
    for a, b in pairwise(row):
        likelihood = np.array([(b in t[a]) / config.successors for t in tables])
        losses.append(-np.log((weight * likelihood).sum() / weight.sum()))
        weight = weight * likelihood
    return np.array(losses)


@pytest.mark.parametrize(("vocab", "successors"), [(3, 1), (4, 2), (4, 3), (3, 3)])
def test_the_floor_of_successor_worlds_is_the_enumerated_posterior(
    vocab: int, successors: int
) -> None:
    config = MarkovConfig(vocab_size=vocab, successors=successors)
    tokens = documents(config, rng(), 3, 25)
    floor = bayes_losses(config, tokens)
    for row, found in zip(tokens, floor, strict=True):
        np.testing.assert_allclose(found, posterior_losses(config, row), atol=1e-5)


@pytest.mark.parametrize("zipf", [0.0, 1.2])
def test_the_floor_of_dirichlet_worlds_is_met_by_their_own_frequencies(zipf: float) -> None:
    """Averaged over worlds, the predictive probability of a token is how often it comes."""
    config = MarkovConfig(kind=MarkovKind.dirichlet, vocab_size=3, alpha=0.7, zipf=zipf)
    tokens = documents(config, rng(), 40_000, 2)
    prior = concentration(config)
    seen = tokens[(tokens[:, 0] == 1) & (tokens[:, 1] == 1)][:, 2]  # 1 -> 1 was seen once
    expected = (prior + np.array([0, 1, 0])) / (prior.sum() + 1)
    np.testing.assert_allclose(np.bincount(seen, minlength=3) / len(seen), expected, atol=0.03)
    losses = bayes_losses(config, np.array([[1, 1, 0], [1, 1, 1]], np.int32))
    np.testing.assert_allclose(np.exp(-losses[:, 1]), expected[:2], atol=1e-6)


def test_a_switch_makes_the_floor_start_again() -> None:
    steady, switching = MarkovConfig(), MarkovConfig(switch_every=64)
    floors = [
        bayes_losses(c, documents(c, rng(3), 200, 256)).mean(axis=0) for c in (steady, switching)
    ]
    assert floors[0][-32:].mean() < 0.75
    for begin in range(0, 256, 64):
        assert floors[1][begin] == pytest.approx(np.log(16), abs=1e-4)
        assert floors[1][begin : begin + 64].mean() == pytest.approx(floors[0][:64].mean(), abs=0.1)


@pytest.mark.parametrize("changes", [{}, {"order": 2}, {"kind": MarkovKind.dirichlet}])
def test_the_floor_of_a_window_is_that_of_a_document_that_begins_with_it(changes: dict) -> None:
    config, reach = MarkovConfig(vocab_size=5, **changes), 9
    tokens = documents(config, rng(), 6, 40)
    found = bayes_losses(config, tokens, reach)
    for t in range(reach, 40):
        alone = bayes_losses(config, tokens[:, t - reach + 1 : t + 2])
        np.testing.assert_allclose(found[:, t], alone[:, -1], rtol=1e-5)
    np.testing.assert_array_equal(bayes_losses(config, tokens, 40), bayes_losses(config, tokens))
    with pytest.raises(ValueError, match="does not hold the context"):
        bayes_losses(config, tokens, config.order - 1)


def test_a_window_forgets_no_more_than_a_switch_did() -> None:
    config, reach = MarkovConfig(vocab_size=5, switch_every=6), 9
    tokens = documents(config, rng(), 6, 40)
    whole, windowed = bayes_losses(config, tokens), bayes_losses(config, tokens, reach)
    np.testing.assert_array_equal(whole, windowed)  # a switch comes before the window ends


def test_the_floor_reads_no_target_before_it_is_scored() -> None:
    config = MarkovConfig(vocab_size=5, switch_every=7)
    tokens = documents(config, rng(), 4, 40)
    before = bayes_losses(config, tokens)
    altered = tokens.copy()
    altered[:, 20] = (altered[:, 20] + 1) % 5
    after = bayes_losses(config, altered)
    np.testing.assert_array_equal(before[:, :19], after[:, :19])
    assert (before[:, 19:] != after[:, 19:]).any()


def test_batches_depend_on_seed_and_step_alone_at_any_number_of_processes() -> None:
    config = MarkovConfig(seq_len=20, batch_size=6)
    whole = MarkovData(config, seed=3)
    parts = [MarkovData(config, seed=3, rank=rank, world=3) for rank in range(3)]
    for step in (5, 0):
        tokens = whole.batch(step)["tokens"]
        assert tokens.shape == (6, 21) and tokens.dtype == np.int32
        np.testing.assert_array_equal(
            np.concatenate([part.batch(step)["tokens"] for part in parts]), tokens
        )
        assert [name for part in parts for name in part.ids(step)] == whole.ids(step)
    assert not np.array_equal(whole.batch(0)["tokens"], whole.batch(1)["tokens"])
    assert not np.array_equal(
        whole.batch(0)["tokens"], MarkovData(config, seed=4).batch(0)["tokens"]
    )
    heldout = whole.heldout_sequences(6, 20)
    assert not np.array_equal(heldout["tokens"], whole.batch(0)["tokens"])
    np.testing.assert_array_equal(heldout["floor"], bayes_losses(config, heldout["tokens"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"successors": 17}, "data.successors=17 is out of range"),
        ({"vocab_size": 512, "order": 2}, "data.order=2"),
        ({"alpha": 0.0}, "data.alpha=0.0"),
        ({"switch_every": 0}, "use null to keep the table"),
    ],
)
def test_worlds_that_cannot_be_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MarkovConfig(**changes)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.batch_size=16 does not divide over 3 processes"):
        MarkovData(MarkovConfig(), seed=0, world=3)
