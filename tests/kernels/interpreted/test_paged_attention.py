"""The kernel of attention over pages, interpreted: against its definition, and bit by bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from kernels import decode_cascade, decode_paged, extend_paged, record
from kernels.kv_cache.attention import launch, reference
from kernels.kv_cache.attention import triton as kernels
from kernels.kv_cache.layout import KINDS, BlockTable, QuantSpec
from kernels.parity.paged_attention import cases, fill, part
from kernels.tiles import Tile, override

CPU = torch.device("cpu")
KV, D, PAGE = 2, 32, 16


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(*lengths: int, kind: str = "none", seed: int = 0, group: int = D):
    """A cache with those requests; the seed decides which pages they are in."""
    pairs = [normal(i, 2, length, KV, D) for i, length in enumerate(lengths)]
    generator = torch.Generator().manual_seed(seed)
    return fill(pairs, PAGE, torch.float32, QuantSpec(kind, group), generator)


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_this_kernel_is_interpreted() -> None:
    assert type(kernels.paged_attention).__name__ == "InterpretedFunction"
    with record() as ran:
        decode_paged(normal(9, 1, 4, D), *filled(3), impl="interpret")
    assert [(choice.op, choice.impl) for choice in ran] == [("decode_paged", "interpret")]


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 24), (torch.float16, 24), (torch.bfloat16, 12)],
    ids=["float32", "float16", "bfloat16"],
)
def test_agrees_with_the_definition(dtype: torch.dtype, count: int) -> None:
    for case in cases("small", count, dtype):
        wrong = [c for c in case.run("interpret", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


def test_tiles_of_many_rows_agree_with_the_definition() -> None:
    """Float32 has none of its own: with them tiles in the middle are read without masks."""
    with override("paged_decode", Tile({"BLOCK_M": 64, "BLOCK_N": 16})):
        for case in list(cases("small", 36, torch.float32))[12:]:
            wrong = [c for c in case.run("interpret", CPU) if not c.holds]
            assert not wrong, (case.name, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_pages_order_and_sharing_do_not_change_a_bit(kind: str) -> None:
    """With pinned splits the result of a request depends on nothing but the request."""
    options = {"splits": 2, "window": 30, "return_lse": True, "impl": "interpret"}
    q = normal(9, 4, 4, D)
    cache, table = filled(5, 0, 40, 48, kind=kind)
    out, lse = decode_paged(q, cache, table, **options)
    elsewhere = decode_paged(q, *filled(5, 0, 40, 48, kind=kind, seed=1), **options)
    assert torch.equal(out, elsewhere[0]) and torch.equal(lse, elsewhere[1])
    for order in (torch.tensor([2, 0, 3, 1]), torch.tensor([2, 2]), torch.tensor([3])):
        picked = BlockTable(*(x if x is None else x[order] for x in vars(table).values()))
        again = decode_paged(q[order], cache, picked, **options)
        assert torch.equal(again[0], out[order]) and torch.equal(again[1], lse[:, order])


def test_any_number_of_splits_agrees() -> None:
    cache, table = filled(150, 0, 33)
    q, sinks = normal(9, 3, 4, D), normal(8, 4)
    expected = reference.decode_paged(q, cache, table, sinks=sinks)
    with override("paged_decode", Tile({"BLOCK_M": 16, "BLOCK_N": 16})):
        for splits in (None, 1, 2, 3, 9, 20):
            got = decode_paged(
                q, cache, table, sinks=sinks, splits=splits, return_lse=True, impl="interpret"
            )
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)


def test_splits_fill_the_chip_but_no_more_than_the_keys_need() -> None:
    tile = Tile({"BLOCK_M": 16, "BLOCK_N": 64})
    options = launch.Options(2**30, 0, 1.0, 0.0)

    def splits(requests: int, tokens: int, options: launch.Options = options) -> int:
        return launch.splits_of(4 * requests, requests, 8, tokens, options, tile, CPU)

    assert splits(1, 32768) == 33  # 8 programs without splitting, for 132 processors
    assert splits(1, 1024) == 4  # 16 tiles
    assert splits(64, 32768) == 1
    assert splits(1, 32768, replace(options, before=511)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_do_not_change_the_result(kind: str) -> None:
    """Tiles in one page and over several, few rows and many, more heads than rows."""
    cache, table = filled(70, 33, kind=kind, group=16)
    q, cu_seqlens = normal(9, 40, 6, D), bounds(0, 35, 40)
    expected, lse = reference.extend_paged(q, cache, table, cu_seqlens=cu_seqlens, window=21)
    for m, n in ((16, 16), (16, 64), (64, 16), (64, 32)):
        with override("paged_decode", Tile({"BLOCK_M": m, "BLOCK_N": n})):
            got = extend_paged(
                q, cache, table, cu_seqlens=cu_seqlens, window=21, return_lse=True, impl="interpret"
            )
        torch.testing.assert_close(got[0].double(), expected, rtol=0, atol=3e-6)
        torch.testing.assert_close(got[1].double(), lse, rtol=0, atol=3e-6)


def test_a_group_of_more_heads_than_a_tile_has_rows() -> None:
    cache, table = filled(20, 3)
    q = normal(9, 2, 2 * 20, D)  # 20 query heads for each key/value head
    with override("paged_decode", Tile({"BLOCK_M": 16, "BLOCK_N": 16})):
        out = decode_paged(q, cache, table, impl="interpret")
    expected, _ = reference.decode_paged(q, cache, table)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_pages_that_fell_out_of_the_window_are_not_read() -> None:
    cache, table = filled(70)
    q, options = normal(9, 1, 4, D), {"window": 20, "impl": "interpret"}
    expected = decode_paged(q, cache, table, **options)
    table.pages[0, :3] = 2**31 - 1  # tokens 0..47 of 70
    assert torch.equal(decode_paged(q, cache, table, **options), expected)


@pytest.mark.parametrize("kind", ["none", "int4"])
def test_cascade_equals_decoding_over_prefix_and_own_tokens(kind: str) -> None:
    """The prefixes fill their pages, so that one table can name theirs and the requests'."""
    prefixes, own, owner = (32, 16), (5, 1, 20), (0, 1, 1)
    cache, table = filled(*prefixes, *own, kind=kind)
    prefix, suffix = part(table, 0, 2), part(table, 2, 5)
    pages = torch.zeros(3, 5, dtype=torch.int32)
    for i, group in enumerate(owner):
        shared = prefixes[group] // PAGE
        pages[i, :shared] = prefix.pages[group, :shared]
        pages[i, shared : shared + 2] = suffix.pages[i, :2]
    lengths = [prefixes[group] + n for group, n in zip(owner, own, strict=True)]
    flat = BlockTable(pages, bounds(*lengths), suffix.tails)
    q, groups = normal(9, 3, 4, D), bounds(0, 1, 3)
    for window in (None, 24):
        options = {"window": window, "sinks": normal(8, 4), "return_lse": True, "impl": "interpret"}
        got = decode_cascade(q, cache, suffix, prefix=prefix, groups=groups, **options)
        torch.testing.assert_close(got, decode_paged(q, cache, flat, **options))


@pytest.mark.parametrize("kind", ["none", "int4"])
def test_the_operators_pass_opcheck(kind: str) -> None:
    cache, table = filled(20, 5, kind=kind)
    tensors, own = launch.tensors_of(cache), launch.tensors_of_table(table)
    # Poison is no number that opcheck could compare.
    tensors = [x.nan_to_num(0.5) if x is not None and x.is_floating_point() else x for x in tensors]
    q = normal(9, 2, 4, D)
    opcheck(launch.paged_attention, (q, tensors, own, None, None, 2, 2**30, 0, 0.2, 0.0))
    arguments = (q, tensors, own, own, bounds(0, 1, 2), None, None, 2**30, 0.2, 0.0)
    opcheck(launch.paged_cascade, arguments)


def test_one_graph_under_compile() -> None:
    torch._dynamo.reset()
    cache, table = filled(20, 5, kind="int8")
    q = normal(9, 2, 4, D)

    def function(q, cache, table, impl):
        cu_seqlens = torch.arange(3, dtype=torch.int32)
        out = extend_paged(q, cache, table, cu_seqlens=cu_seqlens, impl=impl)
        out = out + decode_cascade(q, cache, table, prefix=table, groups=cu_seqlens, impl=impl)
        return out + decode_paged(q, cache, table, window=9, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = compiled(q, cache, table, "interpret")
    torch.testing.assert_close(got, function(q, cache, table, "torch"))
