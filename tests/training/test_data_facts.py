"""Fact documents: every answer is in the document, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from training.data.config import FactsConfig
from training.data.corpus import DataError
from training.data.facts import FactsData, answers, documents
from training.evaluation.recall import read_facts

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def config(**changes) -> FactsConfig:
    return FactsConfig(**{"keys": 12, "values": 9, "facts": [2, 5], "seq_len": 24, **changes})


def pairs(row: np.ndarray) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in row[1:].reshape(-1, 2)]


def test_questions_ask_for_facts_and_facts_have_keys_of_their_own() -> None:
    c = config()
    for facts in (1, 5, 11):
        for row in documents(c, np.random.default_rng(FRESH), 20, facts):
            stated, asked = pairs(row)[:facts], pairs(row)[facts:]
            assert row[0] == 0 and len({key for key, _ in stated}) == facts
            assert all(1 <= key <= 12 and 13 <= value < c.vocab_size for key, value in stated)
            assert set(asked) <= set(stated)


def test_answers_are_the_predictions_of_values_after_the_facts() -> None:
    c = config()
    targets = documents(c, np.random.default_rng(FRESH), 50, 5)[:, 1:]
    mask = answers(c, 5)
    assert mask.sum() == 24 // 2 - 5 and not mask[:10].any()
    assert (targets[:, mask] >= 13).all() and (targets[:, ~mask][:, 10:] < 13).all()


def test_batches_depend_on_seed_and_step_alone_at_any_number_of_processes() -> None:
    c = config(batch_size=6, context_weight=0.25)
    whole = FactsData(c, seed=3)
    parts = [FactsData(c, seed=3, rank=rank, world=3) for rank in range(3)]
    counts = set()
    for step in (9, *range(9)):
        batch = whole.batch(step)
        for key in ("tokens", "weight"):
            joined = np.concatenate([part.batch(step)[key] for part in parts])
            np.testing.assert_array_equal(joined, batch[key])
        assert [name for part in parts for name in part.ids(step)] == whole.ids(step)
        assert set(np.unique(batch["weight"])) == {0.25, 1.0}
        counts.add(int(batch["weight"][0].argmax()))
    assert counts == {5, 11}  # the first answers after 2 and after 5 facts
    assert not np.array_equal(whole.heldout(6, 5), FactsData(c, seed=4).heldout(6, 5))


def test_recall_counts_answers_that_are_more_likely_than_not() -> None:
    c = config()
    data = FactsData(c, seed=1)

    def score(tokens: np.ndarray) -> np.ndarray:
        """Knows the first two facts, guesses among the values of the document for the others."""
        nats = np.full((len(tokens), c.seq_len), 100.0)
        for row, losses in zip(tokens, nats, strict=True):
            known = pairs(row)[:2]
            for place, pair in enumerate(pairs(row)):
                losses[2 * place + 1] = 0.1 if pair in known else np.log(3)
        return nats

    found, series = read_facts(data, 200, [2, 5], score)
    assert found["2"] == {"recalled": 1.0, "nats": pytest.approx(0.1)}
    assert found["5"]["recalled"] == pytest.approx(2 / 5, abs=0.08)
    assert series["recall/recalled"] == [1.0, found["5"]["recalled"]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"facts": [13]}, "data.facts=[13] is out of range: expected numbers from 1 to data.keys="),
        ({"facts": []}, "data.facts=[] is out of range"),
        ({"seq_len": 10}, "set it to at least 12"),
        ({"seq_len": 25}, "data.seq_len=25"),
        ({"context_weight": -1.0}, "data.context_weight=-1.0"),
    ],
)
def test_bad_values_name_their_key(changes: dict, said: str) -> None:
    with pytest.raises(ValueError) as raised:
        config(**changes)
    assert said in str(raised.value)


def test_processes_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.batch_size=32 does not divide over 3"):
        FactsData(config(), seed=0, world=3)
