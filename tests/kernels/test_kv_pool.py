"""Page pools: every page is free or held, whatever is asked of them."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.kv_cache.layout import BlockTable, PagedKV
from kernels.kv_cache.pool import OutOfPages, PagePool, pages_of


def snapshot(pool: PagePool) -> tuple[list[int], list[int]]:
    return [pool.holders(i) for i in range(pool.pages)], list(pool._free)


@pytest.mark.parametrize("seed", range(10))
def test_every_page_is_free_or_held_as_often_as_a_model_says(seed):
    rng = random.Random(seed)
    pool, held = PagePool(12), dict.fromkeys(range(12), 0)
    for _ in range(300):
        action = rng.choice(["alloc", "share", "free"])
        before = snapshot(pool)
        some = [rng.randrange(12) for _ in range(rng.randint(0, 4))]
        if action == "alloc":
            count, free = rng.randint(0, 5), [i for i in held if not held[i]]
            if count > len(free):
                with pytest.raises(OutOfPages):
                    pool.alloc(count)
                assert snapshot(pool) == before
            else:
                taken = pool.alloc(count)
                assert len(set(taken)) == count and set(taken) <= set(free)
                held |= dict.fromkeys(taken, 1)
        elif action == "share":
            if all(held[i] for i in some):
                pool.share(some)
                for i in some:
                    held[i] += 1
            else:
                with pytest.raises(ValueError, match="only a page that is held can be shared"):
                    pool.share(some)
                assert snapshot(pool) == before
        elif all(some.count(i) <= held[i] for i in some):
            freed = pool.free(some)
            for i in some:
                held[i] -= 1
            assert sorted(freed) == sorted({i for i in some if not held[i]})
        else:
            with pytest.raises(ValueError, match="would be freed"):
                pool.free(some)
            assert snapshot(pool) == before
        assert {i: pool.holders(i) for i in held} == held
        assert sorted(pool._free) == [i for i in held if not held[i]]
        assert pool.free_pages + pool.used_pages == pool.pages


def test_the_same_calls_give_the_same_pages():
    def run() -> list[int]:
        pool = PagePool(6)
        first = pool.alloc(4)
        pool.free(first[1:3])
        return first + pool.alloc(3)

    assert run() == run() == [0, 1, 2, 3, 2, 1, 4]


def test_pages_of_a_table_are_those_that_are_read():
    cache = PagedKV.create(9, 16, 1, 2)
    table = BlockTable.create(
        torch.tensor([[4, 2, -1], [8, -1, -1], [1, 0, 3]]), torch.tensor([17, 0, 48]), cache
    )
    assert pages_of(table, cache) == [[4, 2], [], [1, 0, 3]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PagePool(0), "pages=0 must be at least 1"),
        (lambda: PagePool(2).alloc(-1), "count=-1 must be at least 0"),
        (lambda: PagePool(2).free([2]), "page 2 is out of range: the pool has 2"),
        (lambda: PagePool(2).holders(-1), "page -1 is out of range"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
