"""Pages swapped to the host and back: the same bits, and no other page touched."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kernels.kv_cache.layout import PagedKV, QuantSpec
from kernels.kv_cache.swap import _page_tensors, _plan, host_cache, swap_in, swap_out


def filled(pages: int, kind: str, dtype: torch.dtype, seed: int) -> PagedKV:
    """A cache of random bits, NaN among them."""
    spec = QuantSpec(kind, group=8)
    cache = PagedKV.create(pages, 16, 3, 20 if kind != "int4" else 16, dtype=dtype, quant=spec,
                           slots=2)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for x in _page_tensors(cache).values():
        x.view(torch.uint8).random_(generator=generator)
    return cache


def bits(cache: PagedKV) -> list[torch.Tensor]:
    return [x.view(torch.uint8).clone() for x in _page_tensors(cache).values()]


KINDS = [
    ("none", torch.bfloat16), ("none", torch.float32), ("fp8", torch.float16),
    ("int8", torch.float16), ("int4", torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=str)
def test_a_round_trip_returns_every_bit_and_touches_no_other_page(kind, dtype):
    rng = random.Random(0)
    for count in (0, 1, 5):
        cache, host = filled(9, kind, dtype, 1), host_cache(filled(7, kind, dtype, 2), 7)
        for x in _page_tensors(host).values():
            x.view(torch.uint8).fill_(7)
        pages, host_pages = rng.sample(range(9), count), rng.sample(range(7), count)
        before, host_before = bits(cache), bits(host)
        assert swap_out(cache, pages, host, host_pages) is None
        for x, y, z in zip(bits(host), before, host_before, strict=True):
            assert torch.equal(x[host_pages], y[pages])
            others = [i for i in range(7) if i not in host_pages]
            assert torch.equal(x[others], z[others])
        for x in _page_tensors(cache).values():
            x.view(torch.uint8)[pages] = 99
        assert swap_in(cache, pages, host, host_pages) is None
        assert all(torch.equal(x, y) for x, y in zip(bits(cache), before, strict=True))


def test_consecutive_host_pages_are_one_copy():
    cache = filled(9, "none", torch.float32, 0)
    host = host_cache(cache, 9)
    pages, runs = _plan(cache, [5, 0, 8, 3], host, [4, 2, 7, 3])
    assert pages == [0, 3, 5, 8] and runs == [(2, 0, 3), (7, 3, 4)]


def bad_input():
    cache, half = filled(4, "none", torch.float32, 0), filled(4, "none", torch.float16, 0)
    host = host_cache(cache, 3)
    strided = replace(cache, data=cache.data[::2])
    return [
        ((cache, [0, 1], host, [0]), "2 pages do not fit 1 host pages"),
        ((cache, [4], host, [0]), "page 4 is out of range: there are 4"),
        ((cache, [-1], host, [0]), "page -1 is out of range"),
        ((cache, [0], host, [3]), "host page 3 is out of range: there are 3"),
        ((cache, [1, 1], host, [0, 1]), "page 1 is listed twice"),
        ((cache, [0, 1], host, [2, 2]), "host page 2 is listed twice"),
        ((half, [0], host, [0]), "the host cache is laid out as"),
        ((strided, [0], host, [0]), "must be contiguous"),
        ((cache, [0], replace(host, data=host.data.to("meta")), [0]), "must be pinned host memory"),
    ]


@pytest.mark.parametrize("which", range(len(bad_input())))
@pytest.mark.parametrize("swap", [swap_out, swap_in])
def test_bad_input_says_what_was_expected(swap, which):
    (cache, *rest), message = bad_input()[which]
    before = bits(cache)
    with pytest.raises(ValueError, match=message):
        swap(cache, *rest)
    assert all(torch.equal(x, y) for x, y in zip(bits(cache), before, strict=True))


def test_a_host_cache_has_pages():
    with pytest.raises(ValueError, match="pages=0 must be at least 1"):
        host_cache(filled(1, "none", torch.float32, 0), 0)
