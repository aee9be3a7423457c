"""KV compaction: the torch paths against the definition, and what must hold of any cache."""

from __future__ import annotations

import random

import pytest
import torch
from einops import rearrange

from kernels import (
    adaptive_budgets,
    average_rotation,
    compact_kv,
    decode_paged,
    pages_of,
    read_pages,
    score_expected_attention,
    score_key_norm,
    score_window_attention,
    select_top,
)
from kernels.attention.op import attention
from kernels.dispatch import assume_arch
from kernels.kv_cache.append.op import append_kv
from kernels.kv_cache.compaction import op, reference
from kernels.kv_cache.compaction.selection import Kept
from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from kernels.kv_cache.pool import OutOfPages, PagePool
from kernels.parity import compaction as parity
from kernels.parity.compaction import packed, turns
from models.language.transformer import rotate

CPU = torch.device("cpu")


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


def test_adaptive_budgets_keep_the_best_of_all_heads():
    scores = torch.rand(2, 3, 50, generator=generator(0))
    kept = select_top(scores, adaptive_budgets(scores, 40))
    assert kept.counts.sum(-1).tolist() == [40, 40]
    for n in range(2):
        chosen = torch.cat([scores[n, i, kept.tokens[n, i, : kept.counts[n, i]]] for i in range(3)])
        assert chosen.min() == scores[n].flatten().sort(descending=True).values[39]


# Compaction


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_moves_what_the_definition_moves_and_reads_nothing_else(dtype):
    for index in range(40):
        case = parity.gather_case("small", 500 + index, dtype)
        for comparison in case.run("torch", CPU):
            assert comparison.holds, (case.name, comparison)


def test_a_token_moved_wrongly_would_be_seen(monkeypatch):
    gather = op._gather

    def wrong(cache, pages, tokens, counts, *rest):
        gather(cache, pages, (tokens - 1).clamp(min=0), counts, *rest)

    case = parity.moved([20], [[[3, 9]]], {"kind": "none", "kv": 1, "page": 16, "d": 8,
                                           "rotated": False, "seed": 0}, torch.float32)  # fmt: skip
    assert all(x.holds for x in case("torch", CPU))
    monkeypatch.setattr(op, "_gather", wrong)
    assert not all(x.holds for x in case("torch", CPU))


class Requests:
    """Requests with random keys and values in a cache whose unused pages are NaN."""

    def __init__(
        self, lengths: list[int], kv: int = 2, d: int = 8, spare: int = 12, kind: str = "none",
        dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        used = sum(-(-n // 16) for n in lengths)
        self.pool, self.kv = PagePool(used + spare), kv
        self.cache = PagedKV.create(used + spare, 16, kv, d, dtype=dtype, quant=QuantSpec(kind))
        for x in (self.cache.data, self.cache.scales):
            if x is not None and x.dtype != torch.int8:
                x.fill_(float("nan"))
        rows = [self.pool.alloc(-(-n // 16)) for n in lengths]
        width = max(map(len, rows))
        pages = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
        self.table = BlockTable.create(pages, torch.tensor(lengths), self.cache)
        self.k, self.v = normal(7, 2, sum(lengths), kv, d, dtype=dtype)
        begins = torch.tensor([0, *lengths]).cumsum(0).int()
        append_kv(self.cache, self.table, self.k, self.v, cu_seqlens=begins, impl="torch")

    def free_source(self) -> list[int]:
        return [
            freed for pages in pages_of(self.table, self.cache) for freed in self.pool.free(pages)
        ]


def all_of(requests: Requests) -> Kept:
    lengths = requests.table.lengths.tolist()
    return packed([[list(range(n))] * requests.kv for n in lengths], CPU)


def decode(q, compacted, **options):
    kv = len(compacted.table.lengths) // len(q)
    one_head = rearrange(q, "r (kv g) d -> (r kv) g d", kv=kv)
    out = decode_paged(one_head, compacted.cache, compacted.table, impl="torch", **options)
    return rearrange(out, "(r kv) g d -> r (kv g) d", kv=kv)


@pytest.mark.parametrize("kind", ["none", "int8", "fp8"])
def test_keeping_everything_changes_nothing(kind):
    requests = Requests([37, 16, 3], kind=kind, dtype=torch.float32)
    compacted = compact_kv(requests.cache, requests.table, all_of(requests), requests.pool)
    for before, after in zip(
        read_pages(requests.cache, requests.table),
        read_pages(compacted.cache, compacted.table),
        strict=True,
    ):
        assert torch.equal(rearrange(before, "r s kv d -> (r kv) s 1 d"), after)
    q = normal(1, 3, 4, 8, dtype=torch.float32)
    out = decode_paged(q, requests.cache, requests.table, impl="torch")
    torch.testing.assert_close(decode(q, compacted), out, rtol=0, atol=1e-6)


def test_decoding_sees_the_kept_tokens_and_no_others():
    requests = Requests([37, 20])
    kept = packed([[[0, 5, 17, 36], [2]], [list(range(20)), [19]]], CPU)
    compacted = compact_kv(requests.cache, requests.table, kept, requests.pool)
    for page in requests.free_source():
        requests.cache.data[page] = float("nan")  # another request's now
    q = normal(1, 2, 6, 8)
    out = decode(q, compacted)
    keys = requests.k.split([37, 20])
    values = requests.v.split([37, 20])
    for r in range(2):
        for head in range(6):
            tokens = kept.tokens[r, head // 3, : kept.counts[r, head // 3]]
            weights = (keys[r][tokens, head // 3] @ q[r, head] / 8**0.5).softmax(0)
            torch.testing.assert_close(out[r, head], weights @ values[r][tokens, head // 3])


def test_memory_is_freed_for_other_requests():
    requests = Requests([160, 160], spare=6)
    pool = requests.pool
    assert pool.used_pages == 20
    scores = score_key_norm(read_pages(requests.cache, requests.table)[0])
    kept = select_top(scores, adaptive_budgets(scores, 64, floor=8))
    compacted = compact_kv(requests.cache, requests.table, kept, pool)
    freed = requests.free_source()
    # Two heads share a page: 64 tokens of a request and two begun pages are 3 pages at most.
    assert sorted(freed) == list(range(20)) and all(len(x) <= 3 for x in compacted.pages)
    assert pool.used_pages == sum(map(len, compacted.pages)) and pool.free_pages >= 20
    assert compacted.cache.data.data_ptr() == requests.cache.data.data_ptr()
    for pages in compacted.pages:
        pool.free(pages)
    assert pool.free_pages == pool.pages


def test_a_shared_prefix_is_freed_by_its_last_request():
    requests = Requests([32, 32])
    first, second = pages_of(requests.table, requests.cache)
    pool = requests.pool
    pool.share(second[:1])  # a third request reads the second one's first page
    compact_kv(requests.cache, requests.table, all_of(requests), pool)
    assert sorted(requests.free_source()) == sorted({*first, *second[1:]})
    assert pool.free(second[:1]) == second[:1]


def test_turned_keys_are_those_rotated_at_their_new_positions():
    cos, sin = turns(40, 8)
    requests = Requests([40])
    plain = requests.k.clone()
    turned = rotate(plain[None], cos[:, None].double(), sin[:, None].double())[0]
    begins = torch.tensor([0, 40], dtype=torch.int32)
    append_kv(requests.cache, requests.table, turned, requests.v, cu_seqlens=begins, impl="torch")
    kept = packed([[[1, 2, 8, 20, 39], [0, 1, 2]]], CPU)
    compacted = compact_kv(
        requests.cache, requests.table, kept, requests.pool, rope=(cos, sin), impl="torch"
    )
    keys, values = read_pages(compacted.cache, compacted.table)
    for row, tokens in enumerate(([1, 2, 8, 20, 39], [0, 1, 2])):
        n = len(tokens)
        fresh = rotate(plain[None, tokens], cos[:n, None].double(), sin[:n, None].double())
        # Angles in float32: some 1e-6 of a turn at position 40.
        torch.testing.assert_close(keys[row, :n, 0], fresh[0, :, row], rtol=0, atol=1e-5)
        assert torch.equal(values[row, :n, 0], requests.v[tokens, row])


def test_what_is_compacted_can_grow():
    requests = Requests([40, 18], spare=16)
    kept = packed([[[3, 4], list(range(16))], [[0], [7, 17]]], CPU)
    compacted = compact_kv(requests.cache, requests.table, kept, requests.pool, room=3)
    table, q = compacted.table, normal(3, 2, 4, 8)
    one_each = torch.arange(5, dtype=torch.int32)
    new_k, new_v = normal(4, 2, 3, 2, 2, 8)  # keys and values of three steps, [r, kv, d] each
    for step in range(3):
        table = BlockTable.create(table.pages, table.lengths + 1, compacted.cache)
        k, v = (rearrange(x[step], "r kv d -> (r kv) 1 d") for x in (new_k, new_v))
        append_kv(compacted.cache, table, k, v, cu_seqlens=one_each, impl="torch")
    grown = op.Compacted(compacted.cache, table, compacted.pages)
    out = decode(q, grown)
    keys, values = requests.k.split([40, 18]), requests.v.split([40, 18])
    for r in range(2):
        for head in range(4):
            i = head // 2
            tokens = kept.tokens[r, i, : kept.counts[r, i]]
            k = torch.cat([keys[r][tokens, i], new_k[:, r, i]])
            v = torch.cat([values[r][tokens, i], new_v[:, r, i]])
            weights = (k @ q[r, head] / 8**0.5).softmax(0)
            torch.testing.assert_close(out[r, head], weights @ v)


def test_compacting_twice_is_compacting_once():
    requests = Requests([50, 33])
    pool = requests.pool
    first = packed([[list(range(0, 50, 2)), list(range(40))], [list(range(33)), [5, 6]]], CPU)
    then = packed([[[0, 3, 24]], [[39]], [[1, 2]], [[1]]], CPU)
    both = packed([[[0, 6, 48], [39]], [[1, 2], [6]]], CPU)
    half_way = compact_kv(requests.cache, requests.table, first, pool)
    twice = compact_kv(half_way.cache, half_way.table, then, pool)
    for pages in half_way.pages:
        pool.free(pages)
    assert [len(x) for x in twice.pages] == [1, 1]  # the heads of a request share pages again
    once = compact_kv(requests.cache, requests.table, both, pool)
    for x, y in zip(
        read_pages(twice.cache, twice.table), read_pages(once.cache, once.table), strict=True
    ):
        assert torch.equal(x, y)
    for pages in (*twice.pages, *once.pages, *pages_of(requests.table, requests.cache)):
        pool.free(pages)
    assert pool.free_pages == pool.pages


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


def refusals():
    """Options to change, and what must be said."""
    rope = turns(40, 8)
    return [
        ({"pool": PagePool(3)}, "the pool has 3 pages, the cache"),
        ({"pool": PagePool(15)}, "page 0 is in the table but free in the pool"),
        ({"room": -1}, "room=-1 must be >= 0"),
        ({"kept": packed([[[0]]], CPU)}, r"\[r, kv, most\] and counts \[r, kv\] = \[1, 2\]"),
        ({"kept": packed([[[0], [40]]], CPU)}, "ascending, different, and from 0"),
        ({"kept": packed([[[0], [3, 3]]], CPU)}, "ascending, different, and from 0"),
        ({"kept": packed([[[0], [-1]]], CPU)}, "ascending, different, and from 0"),
        (
            {"kept": Kept(torch.zeros(1, 2, 1).long(), torch.ones(1, 2).int())},
            r"kept\.tokens must be torch\.int32",
        ),
        ({"rope": (rope[0][:, :4], rope[1][:, :4])}, r"rope must be cosines and sines"),
        ({"rope": (rope[0][:39], rope[1][:39])}, "angles of 39 positions, a request has 40"),
        ({"rope": (rope[0].double(), rope[1])}, "must be contiguous float32"),
        ({"impl": "triton"}, "not on a GPU"),
    ]


@pytest.mark.parametrize("which", range(len(refusals())))
def test_compaction_refuses_bad_input_before_anything_is_taken(which):
    change, message = refusals()[which]
    requests = Requests([40])
    before, used = requests.cache.data.clone(), requests.pool.used_pages
    options = {"kept": all_of(requests), "pool": requests.pool} | change
    with pytest.raises(ValueError, match=message):
        compact_kv(requests.cache, requests.table, **options)
    assert torch.equal(requests.cache.data.nan_to_num(), before.nan_to_num())
    assert requests.pool.used_pages == used


def test_quantised_keys_are_neither_turned_nor_torn_from_their_channels():
    requests = Requests([40], kind="int8", dtype=torch.float32)
    with pytest.raises(ValueError, match="would quantise the rotated keys of this int8 cache anew"):
        compact_kv(
            requests.cache, requests.table, all_of(requests), requests.pool, rope=turns(40, 8)
        )
    cache = PagedKV.create(4, 16, 2, 8, quant=QuantSpec("int4"), slots=1)
    pages, one = torch.zeros(1, 3, dtype=torch.int32), torch.tensor([0])
    table = BlockTable.create(pages, torch.tensor([40]), cache, one)
    with pytest.raises(ValueError, match="compact before quantising"):
        compact_kv(cache, table, all_of(requests), PagePool(4))


def test_a_full_pool_says_so_and_stays_as_it_was():
    requests = Requests([40], spare=2)
    with pytest.raises(OutOfPages, match="3 pages asked for, 2 of 5 are free"):
        compact_kv(requests.cache, requests.table, all_of(requests), requests.pool)
    assert requests.pool.free_pages == 2
