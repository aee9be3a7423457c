"""Append's kernels, interpreted: every byte of the cache, and as an operator of torch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.library import opcheck

from kernels.dispatch import record
from kernels.kv_cache.append import launch, reference
from kernels.kv_cache.append import triton as append_kernels
from kernels.kv_cache.append.op import append_kv
from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from kernels.parity import append as parity
from kernels.tiles import Tile, override

CPU = torch.device("cpu")
KINDS = ("none", "fp8", "int8", "int4")


def test_these_kernels_are_interpreted() -> None:
    for kernel in (append_kernels.append_rows, append_kernels.append_int4_keys):
        assert type(kernel).__name__ == "InterpretedFunction"
    case = next(parity.cases("small", 1, torch.float32))
    with record() as ran:
        case.run("interpret", CPU)
    assert ran[-1].op == "append_kv" and ran[-1].impl == "interpret"


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 40), (torch.float16, 24), (torch.bfloat16, 24)],
    ids=["float32", "float16", "bfloat16"],
)
def test_the_cache_is_what_the_definition_writes(dtype: torch.dtype, count: int) -> None:
    for case in parity.cases("small", count, dtype):
        wrong = [c for c in case.run("interpret", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


def written(
    function, kind: str, held: list[int], new: list[int], d: int = 16, **more: Any
) -> tuple[PagedKV, PagedKV, torch.Tensor | None]:
    """The cache before and after `function` appended `new` tokens to `held` ones, and q."""
    generator = torch.Generator().manual_seed(5)
    cache, table = parity.poisoned_cache(
        random.Random(0), 16, 2, d, torch.float16, QuantSpec(kind, d // 2), held, new
    )
    k, v = (torch.randn(2, sum(held) + sum(new), 2, d, generator=generator)).half()
    parity.fill(cache, table, held, k[: sum(held)], v[: sum(held)])
    before = parity.mapped(cache, lambda x: parity.copied(x, CPU))
    k, v = k[sum(held) :], v[sum(held) :]
    q = function(cache, table, k, v, cu_seqlens=parity.ends(new), **more)
    return before, cache, q


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_way_to_begin_and_end_in_a_page(kind: str) -> None:
    """Pages of 16: thirty requests at once, with no, one or two middle pages."""
    begins, counts = (0, 1, 15, 16, 17), (0, 1, 15, 16, 17, 34, 50)
    held = [begin for begin in begins for _ in counts]
    new = [count for _ in begins for count in counts]
    before, expected, _ = written(reference.append_kv, kind, held, new)
    _, got, _ = written(append_kv, kind, held, new, impl="interpret")
    wrong = [c for c in parity.compare_caches(before, expected, got, False) if not c.holds]
    assert not wrong, wrong


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_tiles_do_not_change_what_is_written(kind: str) -> None:
    cos, sin = parity.tables(36).values()
    q, weight = torch.randn(60, 3, 36).half(), torch.rand(36)
    options = {"q": q, "rope": (cos, sin), "k_norm": weight, "q_norm": weight}
    held, new = [3, 0, 16], [40, 1, 19]
    before, expected, turned = written(reference.append_kv, kind, held, new, 36, **options)
    for rows, channels in ((8, 8), (64, 32)):
        with (
            override("kv_append", Tile({"BLOCK_T": rows})),
            override("kv_append_int4_keys", Tile({"BLOCK_C": channels})),
        ):
            _, got, out = written(append_kv, kind, held, new, 36, impl="interpret", **options)
        torch.testing.assert_close(out, turned, rtol=2e-3, atol=1e-4)
        wrong = [c for c in parity.compare_caches(before, expected, got, True) if not c.holds]
        assert not wrong, wrong


def test_every_stride_is_respected() -> None:
    """The cache in a layout of heads before tokens; every vector with gaps."""
    kind, held, new = "int4", [3, 0], [20, 17]

    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    def permuted(x: torch.Tensor) -> torch.Tensor:
        order = (*range(x.ndim - 3), x.ndim - 2, x.ndim - 3, x.ndim - 1)
        return x.permute(order).contiguous().permute(order)

    def append(cache: PagedKV, table: BlockTable, k, v, *, cu_seqlens, **more):
        moved = parity.mapped(cache, permuted)
        table = BlockTable(strided(table.pages), strided(table.lengths), strided(table.tails))
        k, v, ends = strided(k), strided(v), strided(cu_seqlens)
        out = append_kv(moved, table, k, v, cu_seqlens=ends, impl="interpret", **more)
        for name in parity.STORED:
            if getattr(cache, name) is not None:
                parity.bits(getattr(cache, name)).copy_(parity.bits(getattr(moved, name)))
        return out

    weight = strided(torch.rand(16, generator=torch.Generator().manual_seed(8)))
    before, expected, _ = written(reference.append_kv, kind, held, new, k_norm=weight)
    _, got, _ = written(append, kind, held, new, k_norm=weight)
    wrong = [c for c in parity.compare_caches(before, expected, got, True) if not c.holds]
    assert not wrong, wrong


def arguments(kind: str, **changes: Any) -> dict[str, Any]:
    """Arguments of the operator: a zeroed cache, two requests, everything asked for."""
    generator = torch.Generator().manual_seed(6)
    quant, slots = QuantSpec(kind, 8), 2 if kind == "int4" else 0
    cache = PagedKV.create(5, 16, 2, 16, dtype=torch.float32, quant=quant, slots=slots)
    for name in parity.STORED:
        if getattr(cache, name) is not None:
            parity.bits(getattr(cache, name)).zero_()
    tails = torch.tensor([1, 0]) if kind == "int4" else None
    table = BlockTable.create(
        torch.tensor([[4, 1], [2, 0]]), torch.tensor([18, 5]), cache, tails=tails
    )
    q, k, v = (torch.randn(20, heads, 16, generator=generator) for heads in (4, 2, 2))
    weight = torch.rand(16, generator=generator)
    given = {"q": q, "k": k, "v": v, **parity.tables(16), "q_norm": weight, "k_norm": weight}
    given |= {"positions": None, "cu_seqlens": parity.ends([16, 4])}
    given |= {"pages": table.pages, "lengths": table.lengths, "tails": table.tails}
    given |= {name: getattr(cache, name) for name in parity.STORED}
    return given | {"norm_eps": 1e-6, "kind": kind} | changes


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_passes_opcheck(kind: str) -> None:
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if kind != "fp8":  # torch has no allclose for float8
        tests.append("test_schema")
    opcheck(launch.append_kv, (), arguments(kind), test_utils=tests)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_writes_what_an_eager_one_writes(kind: str) -> None:
    given = arguments(kind)
    names = ("pages", "lengths", "tails")
    rope, table = (given["cos"], given["sin"]), BlockTable(*(given[name] for name in names))

    def step(cache: PagedKV, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        ends = given["cu_seqlens"]
        return 1 + append_kv(
            cache, table, 2 * k, v, cu_seqlens=ends, q=q, rope=rope, impl="interpret"
        )

    def run(function) -> tuple[PagedKV, torch.Tensor]:
        fresh = arguments(kind)
        cache = PagedKV(
            quant=QuantSpec(kind, 8), dtype=torch.float32, **{n: fresh[n] for n in parity.STORED}
        )
        return cache, function(cache, given["k"], given["v"], given["q"])

    eager, q = run(step)
    compiled, q_compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert torch.equal(q, q_compiled) and parity.bits(eager.data).any()
    for name in parity.STORED:
        if getattr(eager, name) is not None:
            a, b = (parity.bits(getattr(cache, name)) for cache in (eager, compiled))
            assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["none", "int4"])
def test_what_does_not_fit_is_left_out(kind: str) -> None:
    """On a GPU no lengths are read before the launch; the kernels keep within them all the same."""
    names = [name for name in parity.STORED if arguments(kind)[name] is not None]
    # request 0: more new tokens than its length; request 1: as it should be
    short = arguments(kind, lengths=torch.tensor([9, 5]).int())
    launch.append(**short)
    pages = {int(p) for p in short["pages"][1, :1]} | {int(p) for p in short["pages"][0, :1]}
    data = parity.bits(short["data"])
    assert all(bool(data[page].any()) == (page in pages) for page in range(5))
    # fewer new tokens than rows of k
    fewer = arguments(kind, cu_seqlens=parity.ends([0, 4]), lengths=torch.tensor([18, 5]).int())
    launch.append(**fewer)
    assert {p for p in range(5) if parity.bits(fewer["data"])[p].any()} == {2}
    nothing = arguments(kind, cu_seqlens=parity.ends([0, 0]))
    launch.append(**nothing)
    assert not any(parity.bits(nothing[name]).any() for name in names)


def test_a_position_without_a_row_gives_nan() -> None:
    positions = torch.arange(20)
    positions[3], positions[7] = parity.POSITIONS, -1
    given = arguments("none", positions=positions)
    turned = launch.append(**given)
    assert turned.isnan().all(-1).all(-1).nonzero()[:, 0].tolist() == [3, 7]
    stored = given["data"][4, 0]  # keys of request 0: its tokens 2..17 are the new ones
    assert stored.isnan().all(-1).all(-1).nonzero()[:, 0].tolist() == [2 + 3, 2 + 7]
