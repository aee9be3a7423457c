"""KV compaction: the torch path against the definition, and what must hold of any cache."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from kernels import (
    adaptive_budgets,
    compact_kv,
    decode_paged,
    pages_of,
    read_pages,
    score_key_norm,
    select_top,
)
from kernels.kv_cache.append.op import append_kv
from kernels.kv_cache.compaction import op
from kernels.kv_cache.compaction.selection import Kept
from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from kernels.kv_cache.pool import OutOfPages, PagePool
from kernels.parity import compaction as parity
from kernels.parity.compaction import packed, turns
from models.language.layers import rotate

CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


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
