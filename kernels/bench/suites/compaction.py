"""Compaction of a KV cache: the gather of kept tokens, their scores, and pages swapped to the host.

gather   bytes: every kept token of every head read and written once
scores   bytes: the keys once (and the queries); SnapKV: 2 x 2 d operations for each query of the
         window, head and key, as both sweeps compute the logits; expected attention: 2 d^2 + 4 d
         for each head and key
swap     bytes: those of the pages, once over the bus, against one pinned copy of as many
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.bench.cases import (
    Case,
    Entry,
    Inputs,
    Parts,
    Setting,
    Target,
    Work,
    generator,
    normal,
    picked,
)
from kernels.bench.pages import paged, restored, rope, rotated, wipe
from kernels.kv_cache.compaction.op import compact_kv
from kernels.kv_cache.compaction.scores import score_expected_attention, score_window_attention
from kernels.kv_cache.compaction.selection import Kept
from kernels.kv_cache.layout import BlockTable
from kernels.kv_cache.pool import PagePool, pages_of
from kernels.kv_cache.swap import host_cache, swap_in, swap_out
from kernels.parity.case import CAPS

SOURCES = (
    "kv_cache/compaction/*.py",
    "kv_cache/*.py",
    "tuned/kv_gather.json",
    "tuned/kv_window.json",
    "tuned/kv_expected.json",
    "language.py",
    "launch.py",
    "tiles.py",
)
GATHER = Target("gather >= 0.7 of copy bandwidth", 0.7, ceiling="copy")
SWAP = Target("swap >= 0.85 of one pinned copy", 0.85, entry="swap", over="one copy")


@dataclass(frozen=True)
class Problem:
    """r requests of s tokens; half of them are kept."""

    name: str
    r: int
    s: int
    h: int
    kv: int
    d: int
    page: int = 64
    w: int = 64
    rope: bool = False
    kind: str = "none"
    dtype: torch.dtype = torch.bfloat16
    targets: tuple[Target, ...] = ()
    extra: bool = False

    @property
    def kept(self) -> int:
        return self.s // 2

    @property
    def shapes(self) -> dict[str, int | str]:
        sizes = {"r": self.r, "s": self.s, "h": self.h, "kv": self.kv, "d": self.d}
        return {**sizes, "page": self.page}


def cases(at: Setting) -> Iterator[Case]:
    heads = {"h": at.size(32, 4), "kv": at.size(8, 2), "d": at.size(128, 32)}
    paged_in = {**heads, "page": at.size(64, 16), "r": at.size(16, 2), "s": at.length(16384, 64)}
    yield gather_case(Problem("gather half", **paged_in, targets=(GATHER,)), at)
    yield gather_case(Problem("gather half, rotated", **paged_in, rope=True, extra=True), at)
    yield gather_case(Problem("gather half int8", **paged_in, kind="int8", extra=True), at)
    # Pages of 64 KB at full size: 16 tokens of 8 heads of 128.
    blocks = {**heads, "page": 16, "r": 1, "s": at.length(131072, 64)}
    for name in ("swap out", "swap in"):
        yield swap_case(Problem(name, **blocks, targets=(SWAP,)))
    scored = {**heads, "r": at.size(8, 2), "s": at.length(16384, 48), "w": at.size(64, 8)}
    yield score_case(Problem("scores of a window", **scored, extra=True), at)
    yield score_case(Problem("scores expected", **scored, extra=True), at)


def gather_case(problem: Problem, at: Setting) -> Case:
    size = 1 if problem.kind != "none" else problem.dtype.itemsize
    scales = 4 if problem.kind != "none" else 0
    tokens = problem.r * problem.kv * problem.kept
    moved = tokens * (2 * 2 * (problem.d * size + scales) + 4)
    turned = tokens * 3.0 * problem.d if problem.rope else 0.0
    return Case(
        "compaction",
        problem.name,
        problem.shapes | {"kept": problem.kept},
        problem.dtype,
        Work(turned, moved),
        partial(draw_pages, problem),
        partial(gather_oracle, problem),
        partial(gather_parts, problem),
        CAPS[problem.dtype][0],
        tuple(gather_entries(problem, at)),
        problem.targets,
        SOURCES,
        footprint=2 * moved,
        extra=problem.extra,
    )


def draw_pages(problem: Problem, device: torch.device, seed: int) -> Inputs:
    rng = generator(device, seed)
    k, v = (
        normal(rng, problem.r, problem.s, problem.kv, problem.d, dtype=problem.dtype)
        for _ in range(2)
    )
    # Half of the cache holds the requests, the other half is free for what is kept.
    r, s = problem.r, problem.s
    spare = torch.zeros_like(k)
    cache, table = paged(
        torch.cat([k, spare]), torch.cat([v, spare]), problem.page, problem.kind, seed
    )
    table = BlockTable(table.pages[:r], table.lengths[:r])
    pool = PagePool(cache.pages)
    taken = pool.alloc(cache.pages)
    held = {page for pages in pages_of(table, cache) for page in pages}
    pool.free(page for page in taken if page not in held)
    draws = torch.rand(r, problem.kv, s, generator=rng, device=device)
    tokens = draws.topk(problem.kept, dim=-1).indices.sort(-1).values.int()
    counts = torch.full((r, problem.kv), problem.kept, dtype=torch.int32, device=device)
    return {
        "k": k,
        "v": v,
        "cache": cache,
        "table": table,
        "pool": pool,
        "kept": Kept(tokens, counts),
        "rope": rope(s, problem.d, device),
        "free": torch.tensor(sorted(set(range(cache.pages)) - held), device=device),
    }


def gather_entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    size = problem.dtype.itemsize if problem.kind == "none" else 1
    note = picked("kv_gather", at.arch, bytes=size, head_dim=problem.d)
    kernels = ("gather_kept",)
    yield Entry(
        "triton",
        partial(kernel_alone, problem, at.impl),
        ours=True,
        kernels=kernels,
        on_cpu=True,
        note=note,
    )
    for name, impl in (("compact_kv", at.impl), ("compact_kv torch", "torch")):
        yield Entry(
            name,
            partial(whole_call, problem, impl),
            ours=impl != "torch",
            on_cpu=True,
            capturable=False,
            note="its checks, and pages dealt out on the CPU, are timed too",
        )


def whole_call(problem: Problem, impl: str, inputs: Inputs) -> Any:
    turn = inputs["rope"] if problem.rope else None
    cache, table, kept, pool = (inputs[n] for n in ("cache", "table", "kept", "pool"))
    wipe(cache, inputs["free"])

    def call() -> Any:
        compacted = compact_kv(cache, table, kept, pool, rope=turn, impl=impl)
        for pages in compacted.pages:
            pool.free(pages)
        return compacted

    return call


def kernel_alone(problem: Problem, impl: str, inputs: Inputs) -> Any:
    """Only what moves data: the new pages are dealt out before."""
    call = whole_call(problem, impl, inputs)
    if impl == "torch":
        return call
    from kernels.kv_cache.compaction.launch import gather_kept

    compacted = call()
    cache, table, kept = (inputs[n] for n in ("cache", "table", "kept"))
    wipe(cache, inputs["free"])
    cos, sin = inputs["rope"] if problem.rope else (None, None)

    def run() -> Any:
        gather_kept(
            cache.data,
            cache.scales,
            table.pages,
            kept.tokens,
            kept.counts,
            compacted.table.pages,
            cos,
            sin,
        )
        return compacted

    return run


def gather_oracle(problem: Problem, inputs: Inputs) -> Parts:
    """The kept tokens of the last request's last head."""
    k, v = restored(inputs["k"][-1], inputs["v"][-1], problem.page, problem.kind)
    tokens = inputs["kept"].tokens[-1, -1].long()
    keys, values = k[tokens, -1], v[tokens, -1]
    if problem.rope:  # from position j to its rank
        keys = rotated(keys, torch.arange(problem.kept, device=keys.device) - tokens)
    return {"keys": keys, "values": values}


def gather_parts(problem: Problem, compacted: Any) -> Parts:
    cache, table = compacted.cache, compacted.table
    pages = table.pages[-1, : -(-problem.kept // problem.page)].long()
    stored = cache.data.view(torch.uint8)[pages].view(cache.data.dtype)
    both = stored[:, :, :, 0].transpose(0, 1).flatten(1, 2)[:, : problem.kept].double()
    if cache.scales is not None:
        scales = cache.scales[pages][..., 0].transpose(0, 1).flatten(1, 2)[:, : problem.kept]
        both = both * scales[..., None].double()
    return {"keys": both[0], "values": both[1]}


def swap_case(problem: Problem) -> Case:
    count, size = problem.s // problem.page, problem.dtype.itemsize
    moved = 2.0 * problem.s * problem.kv * problem.d * size
    out = problem.name == "swap out"
    return Case(
        "compaction",
        problem.name,
        problem.shapes | {"pages": count, "page_bytes": int(moved) // count},
        problem.dtype,
        Work(0.0, moved),
        partial(draw_swap, problem),
        partial(swapped, out),
        partial(last_pages, out),
        0.0,
        (
            Entry("swap", partial(swap, out), ours=True, on_cpu=True, capturable=False),
            Entry(
                "one copy",
                partial(one_copy, out),
                on_cpu=True,
                capturable=False,
                expected=partial(copied, out),
            ),
        ),
        problem.targets,
        SOURCES,
        through_host=True,
    )


def draw_swap(problem: Problem, device: torch.device, seed: int) -> Inputs:
    rng = generator(device, seed)
    k, v = (normal(rng, 1, problem.s, problem.kv, problem.d, dtype=problem.dtype) for _ in "kv")
    cache, table = paged(k, v, problem.page, "none", seed)
    host = host_cache(cache, cache.pages)
    host.data.normal_(generator=generator(torch.device("cpu"), seed))
    return {"cache": cache, "host": host, "pages": table.pages[0].tolist()}


def swap(out: bool, inputs: Inputs) -> Any:
    """The pages of a request, scattered on the device, to consecutive host pages, or back."""
    move, cache, host, pages = (swap_out if out else swap_in), *swap_sides(inputs)
    host_pages = list(range(len(pages)))

    def call() -> tuple[Tensor, Tensor, list[int]]:
        move(cache, pages, host, host_pages)
        return cache.data, host.data, pages

    return call


def one_copy(out: bool, inputs: Inputs) -> Any:
    """As many bytes in one copy from or to pinned memory."""
    cache, host, pages = swap_sides(inputs)
    source, target = (cache.data, host.data) if out else (host.data, cache.data)

    def call() -> tuple[Tensor, Tensor, list[int]]:
        target.copy_(source, non_blocking=True)
        return cache.data, host.data, pages

    return call


def swap_sides(inputs: Inputs) -> tuple[Any, Any, list[int]]:
    return inputs["cache"], inputs["host"], inputs["pages"]


def last_pages(out: bool, result: tuple[Tensor, Tensor, list[int]]) -> Parts:
    """Where the last four pages of the request have gone to."""
    cache, host, pages = result
    return {"pages": (host[-4:] if out else cache[pages[-4:]]).double().cpu()}


def swapped(out: bool, inputs: Inputs) -> Parts:
    cache, host, pages = swap_sides(inputs)
    return {"pages": (cache.data[pages[-4:]] if out else host.data[-4:]).double().cpu()}


def copied(out: bool, inputs: Inputs) -> Parts:
    cache, host, pages = swap_sides(inputs)
    return {"pages": (cache.data[-4:] if out else host.data[pages[-4:]]).double().cpu()}


def score_case(problem: Problem, at: Setting) -> Case:
    window = problem.name == "scores of a window"
    r, s, h, kv, d, w = (getattr(problem, x) for x in ("r", "s", "h", "kv", "d", "w"))
    size = problem.dtype.itemsize
    read = r * s * kv * d * size + 4 * r * kv * s
    read += r * w * h * d * size if window else r * h * d * (4 + size * d)
    each = 4 * d * w if window else 2 * d * d + 4 * d
    return Case(
        "compaction",
        problem.name,
        problem.shapes | ({"w": w} if window else {}),
        problem.dtype,
        Work(float(r) * h * s * each, float(read)),
        partial(draw_scored, problem),
        partial(score_oracle, problem),
        partial(score_parts, problem),
        CAPS[problem.dtype][1],
        tuple(score_entries(problem, at)),
        problem.targets,
        SOURCES,
        extra=problem.extra,
    )


def draw_scored(problem: Problem, device: torch.device, seed: int) -> Inputs:
    rng, dtype = generator(device, seed), problem.dtype
    r, s, h, kv, d = problem.r, problem.s, problem.h, problem.kv, problem.d
    root = normal(rng, r, h, d, d, dtype=torch.float32) / d**0.5
    return {
        "k": normal(rng, r, s, kv, d, dtype=dtype),
        "q": normal(rng, r, problem.w, h, d, dtype=dtype),
        "mean": normal(rng, r, h, d, dtype=torch.float32),
        "covariance": root @ root.mT,
    }


def score_entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    window = problem.name == "scores of a window"

    def prepare(impl: str, inputs: Inputs) -> Any:
        if window:
            return lambda: score_window_attention(inputs["q"], inputs["k"], impl=impl)
        return lambda: score_expected_attention(
            inputs["mean"], inputs["covariance"], inputs["k"], impl=impl
        )

    kernels = ("window_scores",) if window else ("expected_logits",)
    yield Entry("triton", partial(prepare, at.impl), ours=True, kernels=kernels, on_cpu=True)
    yield Entry("torch", partial(prepare, "torch"), on_cpu=True)


def score_oracle(problem: Problem, inputs: Inputs) -> Parts:
    """Of the last request's first key/value head, without what always scores infinity."""
    group, d, s = problem.h // problem.kv, problem.d, problem.s
    k = inputs["k"][-1, :, 0].double()
    if problem.name == "scores of a window":
        q = inputs["q"][-1, :, :group].double().transpose(0, 1)  # [group, w, d]
        position = torch.arange(s, device=k.device)
        later = position > position[-problem.w :, None]
        weights = (q @ k.mT * d**-0.5).masked_fill(later, float("-inf")).softmax(-1)
        mean = weights.mean((0, 1))[: s - problem.w]
        near = torch.nn.functional.pad(mean, (2, 2)).unfold(0, 5, 1)
        return {"scores": near.mean(-1)}
    mean, covariance = (inputs[n][-1, :group].double() for n in ("mean", "covariance"))
    logits = k @ mean.mT * d**-0.5 + torch.einsum("sd,gde,se->sg", k, covariance, k) / (2 * d)
    return {"scores": logits[4:].softmax(0).mean(1)}


def score_parts(problem: Problem, scores: Tensor) -> Parts:
    if problem.name == "scores of a window":
        return {"scores": scores[-1, 0, : -problem.w]}
    return {"scores": scores[-1, 0, 4:]}
