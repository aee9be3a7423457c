"""Attention over pages on the torch path: against its definition, and what must not matter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kernels import attention, decode_cascade, decode_paged, extend_paged, record
from kernels.dispatch import assume_arch
from kernels.kv_cache.attention import reference
from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from kernels.parity.paged_attention import call, define, draw, fill

KV, D, PAGE = 2, 32, 16


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pairs(*lengths: int) -> list[torch.Tensor]:
    """Keys and values [2, length, kv, d] of each request."""
    return [normal(seed, 2, length, KV, D) for seed, length in enumerate(lengths)]


def filled(
    *lengths: int, kind: str = "none", dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[PagedKV, BlockTable]:
    """A cache with those requests; the seed decides which pages they are in."""
    generator = torch.Generator().manual_seed(seed)
    return fill(pairs(*lengths), PAGE, dtype, QuantSpec(kind), generator)


def test_agrees_with_the_definition_and_reads_no_poison():
    for seed in range(72):  # ops and kinds of cache take turns; unused cells are NaN
        inputs = draw("small", seed, torch.float64)
        for got, expected in zip(call(inputs, "torch"), define(inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_agree_with_the_definition(dtype):
    for seed in range(24):
        inputs = draw("small", seed, dtype)
        (out, _), (expected, _) = call(inputs, "torch"), define(inputs)
        assert out.dtype == dtype and out.shape == inputs.q.shape
        tolerance = 8 * torch.finfo(dtype).eps  # of scores of a few units, exponentiated
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * 3)


def test_decoding_equals_extending_by_one_equals_contiguous_attention():
    lengths = (1, 16, 37)
    cache, table = filled(*lengths)
    q, options = normal(9, 3, 4, D), {"window": 20, "softcap": 5.0, "sinks": normal(8, 4)}
    decoded = decode_paged(q, cache, table, return_lse=True, **options)
    bounds = torch.arange(4, dtype=torch.int32)
    extended = extend_paged(q, cache, table, cu_seqlens=bounds, return_lse=True, **options)
    torch.testing.assert_close(extended, decoded, rtol=0, atol=1e-13)
    for i, (keys, values) in enumerate(pairs(*lengths)):
        out, lse = attention(
            q[None, i : i + 1], keys[None], values[None], return_lse=True, **options
        )
        torch.testing.assert_close(decoded[0][i], out[0, 0], rtol=0, atol=1e-13)
        torch.testing.assert_close(decoded[1][:, i], lse[0, :, 0], rtol=0, atol=1e-13)


def test_extending_in_chunks_equals_extending_at_once():
    (pair,) = pairs(50)
    q, options = normal(9, 50, 4, D), {"window": 30}

    def extend(begin: int, end: int) -> torch.Tensor:
        cache, table = fill([pair[:, :end]], PAGE, pair.dtype, QuantSpec(), torch.Generator())
        bounds = torch.tensor([0, end - begin], dtype=torch.int32)
        return extend_paged(q[begin:end], cache, table, cu_seqlens=bounds, **options)

    chunks = torch.cat([extend(*cut) for cut in ((0, 7), (7, 32), (32, 33), (33, 50))])
    torch.testing.assert_close(chunks, extend(0, 50), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
@pytest.mark.parametrize("window", [None, 9, 40])
def test_cascade_equals_flat_decoding(kind, window):
    """Two groups whose prefixes fill their pages, so that a flat table can name the same pages."""
    prefixes, own = (32, 16), (5, 1, 20)
    cache, table = filled(*prefixes, *own, kind=kind)
    groups = torch.tensor([0, 1, 3], dtype=torch.int32)
    owner = [0, 1, 1]  # group of each request
    q, options = normal(9, 3, 4, D), {"window": window, "sinks": normal(8, 4), "return_lse": True}

    def rows(x, begin, end):
        return None if x is None else x[begin:end]

    prefix, suffix = (
        BlockTable(*(rows(x, *cut) for x in (table.pages, table.lengths, table.tails)))
        for cut in ((0, 2), (2, 5))
    )
    flat_pages = torch.zeros(3, 5, dtype=torch.int32)
    for i, group in enumerate(owner):
        shared = prefixes[group] // PAGE
        flat_pages[i, :shared] = prefix.pages[group, :shared]
        flat_pages[i, shared : shared + 2] = suffix.pages[i, :2]
    lengths = torch.tensor([prefixes[g] + n for g, n in zip(owner, own, strict=True)]).int()
    flat = BlockTable(flat_pages, lengths, suffix.tails)
    expected = decode_paged(q, cache, flat, **options)
    got = decode_cascade(q, cache, suffix, prefix=prefix, groups=groups, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_which_pages_hold_the_tokens_does_not_matter():
    q = normal(9, 3, 4, D)
    first, second = (decode_paged(q, *filled(5, 0, 40, seed=seed)) for seed in (1, 2))
    assert torch.equal(first, second)


def test_requests_may_share_pages():
    cache, table = filled(40)
    twice = BlockTable(table.pages.expand(2, -1), table.lengths.expand(2))
    q = normal(9, 1, 4, D)
    out = decode_paged(q.expand(2, -1, -1), cache, twice)
    torch.testing.assert_close(
        out, decode_paged(q, cache, table).expand(2, -1, -1), rtol=0, atol=1e-14
    )


def test_order_of_the_requests_does_not_matter():
    cache, table = filled(5, 0, 40, 17)
    q, order = normal(9, 4, 4, D), torch.tensor([2, 0, 3, 1])
    shuffled = BlockTable(table.pages[order], table.lengths[order])
    expected = decode_paged(q, cache, table)[order]
    torch.testing.assert_close(
        decode_paged(q[order], cache, shuffled), expected, rtol=0, atol=1e-14
    )


def test_requests_without_tokens_give_zero_and_minus_infinity():
    cache, table = filled(0, 3)
    out, lse = decode_paged(normal(9, 2, 4, D), cache, table, return_lse=True)
    assert (out[0] == 0).all() and (lse[:, 0] == -float("inf")).all()
    assert (out[1] != 0).all() and lse[:, 1].isfinite().all()
    sinks = normal(8, 4)
    out, lse = decode_paged(normal(9, 2, 4, D), cache, table, sinks=sinks, return_lse=True)
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[:, 0], sinks)


# Of the norm of the result. float8 has 3 bits of mantissa: it is off by up to 6 %, by 2.6 % in the
# quadratic mean, in every key and in every value.
@pytest.mark.parametrize(("kind", "cap"), [("fp8", 6e-2), ("int8", 2e-2), ("int4", 1.2e-1)])
def test_quantisation_costs_little(kind, cap):
    lengths = (100, 61)
    q = normal(9, 2, 4, D)
    exact = reference.decode_paged(q, *filled(*lengths))[0]
    for dtype in (torch.float32, torch.bfloat16):
        cache, table = filled(*lengths, kind=kind, dtype=dtype)
        got = decode_paged(q.to(dtype), cache, table).double()
        error = ((got - exact).norm() / exact.norm()).item()
        assert cap / 20 < error < cap


def test_one_graph_under_compile():
    torch._dynamo.reset()
    cache, table = filled(5, 40, kind="int4", dtype=torch.float32)
    q, bounds = normal(9, 2, 4, D).float(), torch.tensor([0, 1, 2], dtype=torch.int32)

    def both(q, cache, table):
        out = decode_paged(q, cache, table, window=30)
        return out + extend_paged(q, cache, table, cu_seqlens=bounds)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, cache, table), both(q, cache, table))


def test_autocast_casts_the_queries_to_what_the_cache_serves():
    cache, table = filled(3, 20, dtype=torch.bfloat16)
    q = normal(9, 2, 4, D).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = decode_paged(q, cache, table)
    assert torch.equal(out, decode_paged(q.bfloat16(), cache, table))


def test_what_ran_is_reported():
    cache, table = filled(3)
    with record() as choices:
        decode_paged(normal(9, 1, 4, D), cache, table)
    assert [(c.op, c.impl) for c in choices] == [("decode_paged", "torch")]


def test_float8_is_refused_on_a_chip_without_it():
    cache, table = filled(3, kind="fp8", dtype=torch.float32)
    q = normal(9, 1, 4, D).float()
    with (
        assume_arch(80),
        pytest.raises(ValueError, match=r"sm_80 has no float8 e4m3fn, .* use quant kind int8"),
    ):
        decode_paged(q, cache, table, impl="triton")
    with assume_arch(80), record() as choices:
        decode_paged(q, cache, table)
    assert choices[0].impl == "torch" and "float8" in choices[0].reason


CACHE, TABLE = filled(3, 20)
OTHER, OTHER_TABLE = filled(3, 20, kind="int4")
Q = normal(9, 2, 4, D)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q[0], CACHE, TABLE), {}, r"expected q \[queries, h, d\] with d=32"),
        ((Q[..., :16], CACHE, TABLE), {}, "with d=32 as in the cache"),
        ((Q[:, :3], CACHE, TABLE), {}, "2 key/value heads do not divide 3 query heads"),
        ((Q.float(), CACHE, TABLE), {}, "q is torch.float32, the cache serves torch.float64"),
        ((Q[:1], CACHE, TABLE), {}, "one query per request: q has 1, the table 2 requests"),
        ((Q, CACHE, replace(TABLE, lengths=TABLE.lengths[:1])), {}, r"got \[2, 3\] and \[1\]"),
        ((Q, CACHE, replace(TABLE, pages=TABLE.pages.long())), {}, "table must hold int32"),
        ((Q, CACHE, OTHER_TABLE), {}, "tails exactly if the cache is int4"),
        ((Q, OTHER, TABLE), {}, "tails exactly if the cache is int4"),
        ((Q, CACHE, TABLE), {"window": 0}, "window=0 must be at least 1"),
        ((Q, CACHE, TABLE), {"sinks": Q[0, :3, 0]}, r"sinks must be \[h\] = \[4\], got \[3\]"),
        ((Q, CACHE, TABLE), {"softcap": -1.0}, "softcap=-1.0 must be > 0"),
        ((Q, CACHE, TABLE), {"scale": 0.0}, "scale=0.0 must be > 0"),
        ((Q, CACHE, TABLE), {"splits": 0}, "splits=0 must be at least 1"),
        ((Q, CACHE, TABLE), {"impl": "sdpa"}, "impl='sdpa' is unknown"),
        ((Q, CACHE, TABLE), {"impl": "triton"}, "not on a GPU"),
        ((Q, CACHE, TABLE), {"impl": "interpret"}, "TRITON_INTERPRET=1"),
    ],
)
def test_bad_input_says_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        decode_paged(*arguments, **options)


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": bounds(0, 2)}, "cu_seqlens must hold 3 integers for 2 requests"),
        ({"cu_seqlens": bounds(0, 1, 2).double()}, "of torch.float64"),
        ({"cu_seqlens": bounds(0, 1, 3)}, r"ascend from 0 to the 2 queries of q, got \[0, 1, 3\]"),
        ({"cu_seqlens": bounds(0, 3, 2)}, r"ascend from 0 to the 2 queries of q, got \[0, 3, 2\]"),
        ({"cu_seqlens": bounds(0, 1, 2), "causal": False, "window": 3}, "needs causal=True"),
    ],
)
def test_bad_extends_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        extend_paged(Q, CACHE, TABLE, **options)


def test_more_queries_than_tokens_are_refused():
    with pytest.raises(ValueError, match="request 0 has 4 queries in cu_seqlens but 3 tokens"):
        extend_paged(normal(9, 4, 4, D), CACHE, TABLE, cu_seqlens=bounds(0, 4, 4))


@pytest.mark.parametrize(
    ("prefix", "groups", "message"),
    [
        (TABLE, bounds(0, 2), "groups must hold 3 integers"),
        (TABLE, bounds(0, 1, 1), r"ascend from 0 to the 2 requests of q, got \[0, 1, 1\]"),
        (OTHER_TABLE, bounds(0, 1, 2), "prefix has tails exactly if the cache is int4"),
        (replace(TABLE, pages=TABLE.pages[0]), bounds(0, 1, 2), "prefix must have pages"),
    ],
)
def test_bad_prefixes_say_what_was_expected(prefix, groups, message):
    with pytest.raises(ValueError, match=message):
        decode_cascade(Q, CACHE, TABLE, prefix=prefix, groups=groups)


def test_definition_equals_the_definition_of_contiguous_attention():
    from kernels.attention.reference import attention as contiguous

    for causal, window in itertools.product((True, False), (None, 4)):
        (pair,) = pairs(21)
        cache, table = filled(21)
        q, sinks = normal(9, 6, 4, D), normal(8, 4)
        options = {"causal": causal, "window": window, "sinks": sinks, "softcap": 3.0}
        out, lse = reference.extend_paged(q, cache, table, cu_seqlens=bounds(0, 6), **options)
        expected = contiguous(q[None], pair[None, 0], pair[None, 1], **options)
        torch.testing.assert_close((out[None], lse[None]), expected)
