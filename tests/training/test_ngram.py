"""The vectorised n-gram floors against a plain dictionary implementation, and compressors."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from training.evaluation.compression import gzip_bits_per_byte, xz_bits_per_byte
from training.evaluation.ngram import SEPARATOR, bits_per_byte, probabilities


class Oracle:
    """Witten-Bell by the book: one Counter per context."""

    def __init__(self, documents, max_order):
        self.counts = [defaultdict(Counter) for _ in range(max_order + 1)]
        for document in documents:
            padded = [SEPARATOR] * max_order + list(document)
            for i in range(max_order, len(padded)):
                for order, table in enumerate(self.counts):
                    table[tuple(padded[i - order : i])][padded[i]] += 1

    def probability(self, order, context, symbol):
        """p_order(symbol | the last bytes of context)."""
        if order < 0:
            return 1 / 256
        lower = self.probability(order - 1, context, symbol)
        padded = [SEPARATOR] * order + list(context)
        followers = self.counts[order].get(tuple(padded[len(padded) - order :]))
        if not followers:
            return lower
        total, kinds = sum(followers.values()), len(followers)
        return (followers[symbol] + kinds * lower) / (total + kinds)


def make_documents(seed, count):
    rng = random.Random(seed)
    alphabet = b"abc\x00\xff"
    return [bytes(rng.choices(alphabet, k=rng.randrange(0, 30))) for _ in range(count)]


@pytest.mark.parametrize("max_order", [0, 1, 3, 6])
def test_agrees_with_the_oracle(max_order):
    train, held = make_documents(0, 12), make_documents(1, 5)
    oracle = Oracle(train, max_order)
    got = probabilities(train, held, max_order)
    for order in range(max_order + 1):
        expected = [
            oracle.probability(order, document[:i], document[i])
            for document in held
            for i in range(len(document))
        ]
        np.testing.assert_allclose(got[order], expected, rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"a", b"abc", b"abcabc", b"zzz"])
def test_probabilities_sum_to_one(context):
    queries = [context + bytes([symbol]) for symbol in range(256)]
    table = probabilities(make_documents(0, 12), queries, 5)
    last = table.reshape(6, 256, len(context) + 1)[:, :, -1]
    np.testing.assert_allclose(last.sum(axis=1), 1.0, rtol=1e-12)


def test_separators_part_documents():
    documents = make_documents(3, 6)
    joined = np.concatenate([[SEPARATOR, *document] for document in documents]).astype(np.uint16)
    held = make_documents(4, 3)
    assert np.array_equal(probabilities(documents, held), probabilities([joined], held))


def test_bits_per_byte_is_the_mean_code_length():
    train, held = make_documents(0, 12), make_documents(1, 5)
    table = probabilities(train, held, 2)
    expected = [-sum(math.log2(p) for p in row) / len(row) for row in table]
    np.testing.assert_allclose(bits_per_byte(train, held, 2), expected)


def test_without_training_text_every_byte_costs_eight_bits():
    assert bits_per_byte([], [b"abc"], 3) == [8.0] * 4


def test_more_context_helps_on_periodic_text():
    bits = bits_per_byte([b"abac" * 500], [b"abac" * 50], 3)
    assert bits[0] == pytest.approx(1.5, abs=0.05)
    assert bits[1] == pytest.approx(0.5, abs=0.05)
    assert bits[2] < 0.1


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="max_order=7"):
        bits_per_byte([b"a"], [b"a"], 7)
    with pytest.raises(ValueError, match="no bytes"):
        bits_per_byte([b"a"], [b""])
    with pytest.raises(ValueError, match=r"data\.tokenizer=null"):
        bits_per_byte([np.array([1000])], [b"a"])


def test_compressors():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    for measure in (gzip_bits_per_byte, xz_bits_per_byte):
        assert 7.9 < measure(noise) < 8.2
        assert measure(b"afferent" * 5000) < 0.2
        with pytest.raises(ValueError, match="empty"):
            measure(b"")
