"""The layout of the paged cache: sizes, bytes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec


def cache(kind: str = "none", **changes) -> PagedKV:
    sizes = {"pages": 4, "page": 16, "kv": 2, "d": 8, "dtype": torch.float32}
    sizes |= {"quant": QuantSpec(kind, group=4), "slots": 3} | changes
    return PagedKV.create(**sizes)


def table(on: PagedKV, **changes) -> BlockTable:
    """Two requests, of 20 and 16 tokens, in pages 3, 0 and 1."""
    given = {"pages": torch.tensor([[3, 0], [1, -1]]), "lengths": torch.tensor([20, 16])}
    given |= {"tails": torch.tensor([2, 0])} if on.quant.kind == "int4" else {}
    return BlockTable.create(**given | changes, cache=on)


@pytest.mark.parametrize("kind", ["none", "fp8", "int8", "int4"])
def test_a_cache_knows_its_sizes(kind: str) -> None:
    pool = cache(kind)
    assert (pool.pages, pool.page, pool.kv, pool.d) == (4, 16, 2, 8)
    assert pool.dtype == torch.float32 and pool.device.type == "cpu"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", 2 * 2 * 64 * 2),  # keys and values, 2 heads of 64, 2 bytes
        ("fp8", 2 * 2 * (64 + 4)),  # a byte each, and a float32 for each head
        ("int8", 2 * 2 * (64 + 4)),
        # half a byte each; 2 float16 for each group of a value, and for each channel of 16 keys
        ("int4", 2 * (2 * 32 + 2 * 2 * 2 + 2 * 2 * 64 / 16)),
    ],
)
def test_bytes_of_a_token_count_everything_that_is_read(kind: str, expected: float) -> None:
    pool = cache(kind, d=64, dtype=torch.bfloat16, quant=QuantSpec(kind, group=32))
    assert pool.bytes_per_token == expected


def test_a_group_is_not_wider_than_a_head() -> None:
    assert cache("int4", quant=QuantSpec("int4", group=64)).quant.group == 8


def test_a_table_has_int32_on_the_device_of_the_cache() -> None:
    for kind in ("none", "int4"):
        made = table(cache(kind))
        fields = [made.pages, made.lengths] + ([made.tails] if kind == "int4" else [])
        assert all(x.dtype == torch.int32 and x.device.type == "cpu" for x in fields)
    empty = table(
        cache(), pages=torch.zeros(0, 3, dtype=torch.int64), lengths=torch.zeros(0).long()
    )
    assert empty.pages.shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"page": 24}, r"page=24 must be a power of two"),
        ({"page": 8}, r"page=8 must be a power of two, at least 16"),
        ({"pages": 0}, r"pages=0, kv=2, d=8 must all be at least 1"),
        ({"dtype": torch.int8}, r"dtype=torch.int8: a cache serves"),
        ({"kind": "int4", "d": 7}, r"even head width .* d=7"),
        ({"kind": "int4", "d": 10}, r"group=4 divides, got d=10"),
        ({"kind": "int4", "slots": 0}, r"slots >= 1"),
    ],
)
def test_sizes_that_do_not_work_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cache(**changes)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="quant kind='int2' is unknown: use none, fp8"):
        QuantSpec("int2")
    with pytest.raises(ValueError, match="group=0 must be at least 1"):
        QuantSpec("int4", group=0)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("none", {"pages": torch.tensor([[3, 4], [1, 0]])}, r"page 4 is out of range"),
        ("none", {"pages": torch.tensor([[3, -1], [1, 0]])}, r"page -1 is out of range"),
        ("none", {"lengths": torch.tensor([-1, 3])}, r"lengths must be >= 0, got -1"),
        ("none", {"lengths": torch.tensor([33, 3])}, r"33 tokens needs 3 pages of 16"),
        ("none", {"lengths": torch.tensor([3])}, r"pages \[r, most\] and lengths \[r\]"),
        ("none", {"pages": torch.tensor([3, 0])}, r"pages \[r, most\] and lengths \[r\]"),
        ("none", {"lengths": torch.tensor([3.0, 1.0])}, r"lengths must hold integers"),
        ("none", {"tails": torch.tensor([0, 1])}, r"exactly for an int4 cache"),
        ("int4", {"tails": None}, r"exactly for an int4 cache"),
        ("int4", {"tails": torch.tensor([0, 3])}, r"tails must be in 0..2"),
        ("int4", {"tails": torch.tensor([0])}, r"tails must be \[r\] = \[2\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(kind: str, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        table(cache(kind), **changes)


def test_entries_past_the_last_page_are_not_looked_at() -> None:
    assert int(table(cache(), lengths=torch.tensor([16, 0])).lengths.sum()) == 16
