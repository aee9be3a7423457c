"""Scores of cached keys and the selection by them: against the definition, and what they mean."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import (
    adaptive_budgets,
    average_rotation,
    score_expected_attention,
    score_key_norm,
    score_window_attention,
    select_top,
)
from kernels.attention.op import attention
from kernels.dispatch import assume_arch
from kernels.kv_cache.compaction import reference
from kernels.parity import compaction as parity
from kernels.parity.compaction import turns
from models.language.layers import rotate


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


# Scores


@pytest.mark.parametrize("seed", range(12))
def test_scores_are_those_of_the_definition(seed):
    rng = random.Random(seed)
    b, s, kv, group, d = 2, rng.randint(3, 20), rng.choice([1, 2]), rng.choice([1, 3]), 6
    w = rng.randint(1, s)
    k, v = normal(seed, 2, b, s, kv, d)
    q, mean = normal(seed + 100, b, w, kv * group, d), normal(seed + 200, b, kv * group, d)
    root = normal(seed + 300, b, kv * group, d, d)
    lengths = None if seed % 3 == 0 else torch.tensor([s, rng.randint(0, s)])
    options = {
        "lengths": lengths,
        "pooling": rng.choice(["avg", "max"]),
        "kernel_size": rng.choice([1, 3, 7]),
        "keep_window": rng.random() < 0.5,
        "scale": rng.choice([None, 0.7]),
    }
    more = {"lengths": lengths, "sink": rng.choice([0, 4]), "epsilon": rng.choice([0, 0.1])}
    cov = rng.choice([root @ root.mT / d, None])
    k, v = (parity.unread(x, lengths) for x in (k, v))
    for got, want in (
        (score_key_norm(k, lengths=lengths), reference.score_key_norm(k, lengths)),
        (
            score_window_attention(q, k, **options, impl="torch"),
            reference.score_window_attention(q, k, **options),
        ),
        (
            score_expected_attention(mean, cov, k, v, **more, impl="torch"),
            reference.score_expected_attention(mean, cov, k, v, **more),
        ),
    ):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_one_unpooled_query_scores_its_attention_weights():
    s, h, kv = 12, 4, 2
    q, k = normal(0, 1, 1, h, s), normal(1, 1, s, kv, s)
    identity = torch.eye(s, dtype=torch.float64)[None, :, None].expand(1, s, kv, s)
    weights = attention(q, k, identity, impl="torch")  # [1, 1, h, s]: what each key is given
    scores = score_window_attention(q, k, kernel_size=1, keep_window=False)
    torch.testing.assert_close(scores[0], weights[0, 0].unflatten(0, (kv, -1)).mean(1))


def test_window_is_kept_and_its_keys_do_not_reach_the_others():
    q, k = normal(0, 1, 4, 2, 8), normal(1, 1, 20, 1, 8)
    scores = score_window_attention(q, k, pooling="max", kernel_size=5)
    assert scores[0, 0, 16:].isinf().all() and scores[0, 0, :16].isfinite().all()
    kept = select_top(scores, 6)
    assert kept.tokens[0, 0].tolist()[-4:] == [16, 17, 18, 19]


def test_low_norms_are_kept():
    k = torch.arange(1.0, 11.0)[None, torch.randperm(10, generator=generator(0)), None, None]
    kept = select_top(score_key_norm(k), 3).tokens[0, 0].long()
    assert sorted(k[0, kept, 0, 0].tolist()) == [1, 2, 3]


def test_expected_attention_is_the_mean_over_gaussian_queries():
    d, s = 4, 6
    root = 0.5 * normal(0, d, d)
    mean, k = normal(1, 1, 1, d), normal(2, 1, s, 1, d)
    queries = mean[0] + normal(3, 400_000, d) @ root.T
    weights = (queries @ k[0, :, 0].T / d**0.5).exp().mean(0)
    scores = score_expected_attention(mean, (root @ root.T)[None, None], k, sink=0)
    torch.testing.assert_close(scores[0, 0], weights / weights.sum(), rtol=0.02, atol=0)


def test_averaged_rotation_is_the_mean_of_rotated_queries():
    mean, root = normal(0, 2, 3, 8), normal(1, 2, 3, 8, 8)
    cos, sin = (x.double() for x in turns(30, 8))
    cov = root @ root.mT
    got = average_rotation(mean, cov, cos[20:], sin[20:])
    for x, y in zip(got, reference.average_rotation(mean, cov, cos[20:], sin[20:]), strict=True):
        torch.testing.assert_close(x, y)
    x = mean[:, None].expand(2, 10, 3, 8)  # one query at ten positions
    torch.testing.assert_close(got[0], rotate(x, cos[20:, None], sin[20:, None]).mean(1))


def test_scores_have_gradients():
    q, k, v = normal(0, 1, 3, 2, 4), normal(1, 1, 7, 1, 4), normal(2, 1, 7, 1, 4)
    mean, cov = normal(3, 1, 2, 4), normal(4, 1, 2, 4, 4)
    for x in (q, k, v, mean, cov):
        x.requires_grad_()

    def finite(scores):
        return scores[scores.isfinite()]

    assert torch.autograd.gradcheck(lambda q, k: finite(score_window_attention(q, k)), (q, k))
    expected = lambda *x: finite(score_expected_attention(*x, epsilon=0.1))  # noqa: E731
    assert torch.autograd.gradcheck(expected, (mean, cov, k, v))
    with assume_arch(90), pytest.raises(ValueError, match="the kernels have no derivative"):
        score_window_attention(q.float(), k.float(), impl="triton")


def test_scores_trace_into_one_graph_and_run_on_meta():
    def scores(q, k, v, mean, cov):
        return (
            score_key_norm(k)
            + score_window_attention(q, k, impl="torch")
            + score_expected_attention(mean, cov, k, v, impl="torch")
        )

    inputs = normal(0, 1, 3, 4, 8), normal(1, 1, 9, 2, 8), normal(2, 1, 9, 2, 8)
    inputs = (*inputs, normal(3, 1, 4, 8), normal(4, 1, 4, 8, 8))
    torch._dynamo.reset()
    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), scores(*inputs))
    assert scores(*(x.to("meta") for x in inputs)).shape == (1, 2, 9)


# Selection


@pytest.mark.parametrize("seed", range(20))
def test_selection_is_that_of_the_definition(seed):
    rng = random.Random(seed)
    b, kv, s = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 20)
    scores = torch.randint(-3, 4, (b, kv, s), generator=generator(seed)).double()  # many ties
    scores[scores == -3] = float("-inf")
    scores[scores == 3] = float("inf")
    lengths = None if rng.random() < 0.5 else torch.tensor([rng.randint(0, s) for _ in range(b)])
    forced = {"lengths": lengths, "sink": rng.randint(0, 2), "recent": rng.randint(0, 2)}
    floor = rng.randint(0, 3)
    total = kv * max(floor, forced["sink"] + forced["recent"]) + rng.randint(0, s)
    budgets = adaptive_budgets(scores, total, floor, **forced)
    assert budgets.tolist() == reference.adaptive_budgets(scores, total, floor, **forced)
    for budget in (forced["sink"] + forced["recent"] + rng.randint(0, s), budgets):
        if isinstance(budget, torch.Tensor):
            budget = budget.clamp(min=forced["sink"] + forced["recent"])
        kept = select_top(scores, budget, **forced)
        want = reference.select_top(scores, budget, **forced)
        assert kept.counts.tolist() == [[len(x) for x in row] for row in want]
        assert [
            [tokens[:n] for tokens, n in zip(*rows, strict=True)]
            for rows in zip(kept.tokens.tolist(), kept.counts.tolist(), strict=True)
        ] == want
        assert ((kept.tokens == -1).sum(-1) == kept.tokens.shape[2] - kept.counts).all()


def test_no_number_of_endless_scores_takes_what_a_head_is_sure_of():
    scores = torch.rand(1, 3, 20, generator=torch.Generator().manual_seed(0))
    scores[:, 0, :15] = float("inf")
    budgets = adaptive_budgets(scores, 12, floor=3)
    assert budgets.tolist() == reference.adaptive_budgets(scores, 12, 3) == [[6, 3, 3]]


def test_adaptive_budgets_keep_the_best_of_all_heads():
    scores = torch.rand(2, 3, 50, generator=generator(0))
    kept = select_top(scores, adaptive_budgets(scores, 40))
    assert kept.counts.sum(-1).tolist() == [40, 40]
    for n in range(2):
        chosen = torch.cat([scores[n, i, kept.tokens[n, i, : kept.counts[n, i]]] for i in range(3)])
        assert chosen.min() == scores[n].flatten().sort(descending=True).values[39]


# Bad input

K = torch.zeros(2, 9, 2, 4)
Q = torch.zeros(2, 3, 4, 4)
SCORES = torch.zeros(2, 2, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_key_norm(K[0]), r"k must be \[b, s, kv, d\]"),
        (lambda: score_key_norm(K, lengths=torch.tensor([9])), r"lengths must be integers \[b\]"),
        (lambda: score_key_norm(K, lengths=torch.tensor([9, 10])), r"in 0\.\.9, got \[9, 10\]"),
        (lambda: score_window_attention(Q[:, :, :3], K), "a multiple of 2, 4"),
        (lambda: score_window_attention(Q.half(), K), "q_window is torch.float16 but k is"),
        (lambda: score_window_attention(Q, K[:, :2]), "1 to 2 queries, got 3"),
        (lambda: score_window_attention(Q, K, kernel_size=4), "kernel_size=4 must be odd"),
        (lambda: score_window_attention(Q, K, pooling="sum"), "pooling='sum' is unknown"),
        (lambda: score_window_attention(Q, K, scale=0.0), "scale=0.0 must be > 0"),
        (lambda: score_window_attention(Q, K, impl="triton"), "not on a GPU"),
        (lambda: score_window_attention(Q, K, impl="interpret"), "TRITON_INTERPRET=1"),
        (lambda: score_expected_attention(Q, None, K), r"mean_q must be \[b, h, d\]"),
        (lambda: score_expected_attention(Q[:, 0], Q, K), r"cov_q must be \[b, h, d, d\]"),
        (lambda: score_expected_attention(Q[:, 0], None, K, K.half()), "v must be as k"),
        (lambda: score_expected_attention(Q[:, 0], None, K, sink=-1), "sink=-1"),
        (lambda: average_rotation(Q[:, 0], None, K[0, :, 0, :2], K[0, :, 0]), "positions, 4"),
        (lambda: select_top(SCORES[0], 1), r"scores must be floats \[b, kv, s\]"),
        (lambda: select_top(SCORES, 2, sink=2, recent=1), "a budget of 2 does not hold"),
        (lambda: select_top(SCORES, torch.ones(2)), r"integers \[b, kv\] = \[2, 2\]"),
        (lambda: select_top(SCORES, 2, sink=-1), "sink=-1 and recent=0"),
        (lambda: select_top(SCORES / 0, 2), "a score is not a number"),
        (lambda: adaptive_budgets(SCORES, 5, floor=3), r"at least .* = 2 \* 3"),
    ],
)
def test_scores_and_selection_refuse_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
