"""Appending new tokens to a paged cache, with RoPE on queries and keys, in each storage format.

A memory-bound op. Bytes: q, k, v read, q written, keys and values written as they are stored, one
row of float32 cosines and sines for each position. Floating-point operations: 3 for each rotated
channel. Peers: the same in torch, eager and (bfloat16 only) compiled.
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
    variants,
    with_tile,
)
from kernels.bench.pages import bytes_per_token, empty_cache, rope, rotated, table_of, wipe
from kernels.bench.peers import compiled
from kernels.bench.suites.decode import has_fp8
from kernels.kv_cache.append.op import append_kv
from kernels.kv_cache.layout import BlockTable
from kernels.kv_cache.quantise import dequantise
from kernels.parity.case import CAPS

SOURCES = (
    "kv_cache/append/*.py",
    "kv_cache/*.py",
    "tuned/kv_append*.json",
    "language.py",
    "launch.py",
    "tiles.py",
)
BANDWIDTH = Target("append >= 0.75 of copy bandwidth", 0.75, ceiling="copy")
STORED = {"none": 0.0, "int8": 2e-2, "fp8": 5e-2, "int4": 2e-1}
"What a format loses at most of normal values, as a relative norm, besides the dtype's cap."


@dataclass(frozen=True)
class Problem:
    """r requests of `held` tokens get `new` more each."""

    name: str
    r: int
    new: int
    h: int
    kv: int
    d: int
    page: int
    held: int = 0
    kind: str = "none"
    norm: bool = False
    targets: tuple[Target, ...] = ()
    extra: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def n(self) -> int:
        return self.r * self.new


def problems(at: Setting) -> Iterator[Problem]:
    heads = {"h": at.size(32, 4), "kv": at.size(8, 2), "d": at.size(128, 32)}
    heads |= {"page": at.size(64, 16), "r": at.size(32, 3), "new": at.length(2048, 32)}
    yield Problem("64k tokens bf16", **heads, targets=(BANDWIDTH,))
    for kind in ("int8", "fp8", "int4"):
        if kind != "fp8" or has_fp8(at.arch):
            yield Problem(f"64k tokens {kind}", **heads, kind=kind, targets=(BANDWIDTH,))
    yield Problem("64k tokens bf16 qk-norm", **heads, norm=True, extra=True)
    one = {**heads, "r": at.size(256, 4), "new": 1, "held": at.length(4096, 31)}
    yield Problem("one token bf16", **one, extra=True)


def cases(at: Setting) -> Iterator[Case]:
    for problem in problems(at):
        shapes = {"r": problem.r, "new": problem.new, "held": problem.held, "h": problem.h}
        shapes |= {"kv": problem.kv, "d": problem.d, "page": problem.page}
        yield Case(
            "append",
            problem.name,
            shapes,
            problem.dtype,
            work(problem),
            partial(draw, problem),
            partial(oracle, problem),
            partial(parts, problem),
            CAPS[problem.dtype][0] + STORED[problem.kind],
            tuple(entries(problem, at)),
            problem.targets,
            SOURCES,
            extra=problem.extra,
        )


def work(problem: Problem) -> Work:
    n, h, kv, d, size = problem.n, problem.h, problem.kv, problem.d, problem.dtype.itemsize
    stored = n * bytes_per_token(problem.kind, size, problem.page, kv, d)
    positions = 2 * 4 * d * min(n, problem.held + problem.new)
    return Work(3.0 * n * (h + kv) * d, (2 * h + 2 * kv) * n * d * size + stored + positions)


def draw(problem: Problem, device: torch.device, seed: int) -> Inputs:
    rng, r, page, dtype = generator(device, seed), problem.r, problem.page, problem.dtype
    inputs: Inputs = {
        name: normal(rng, problem.n, heads, problem.d, dtype=dtype)
        for name, heads in (("q", problem.h), ("k", problem.kv), ("v", problem.kv))
    }
    length = problem.held + problem.new
    columns = -(-length // page)
    pages = torch.randperm(r * columns, generator=torch.Generator().manual_seed(seed))
    cache = empty_cache(r * columns, page, inputs["k"], problem.kind, r)
    table = table_of(pages.view(r, columns), [length] * r, cache)
    norms = {}
    if problem.norm:
        norms = {
            name: normal(rng, problem.d, dtype=dtype).abs() + 0.5 for name in ("q_norm", "k_norm")
        }
    ends = torch.arange(r + 1, dtype=torch.int32, device=device) * problem.new
    return (
        inputs
        | norms
        | {
            "cache": cache,
            "table": table,
            "cu_seqlens": ends,
            "rope": rope(length, problem.d, device),
        }
    )


def entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    def ours(impl: str, inputs: Inputs) -> Any:
        options = {n: inputs[n] for n in ("cu_seqlens", "q", "rope")}
        options |= {n: inputs[n] for n in ("q_norm", "k_norm") if problem.norm}
        cache, table = inputs["cache"], inputs["table"]
        wipe(cache)

        def call() -> tuple:
            q = append_kv(cache, table, inputs["k"], inputs["v"], impl=impl, **options)
            return q, cache, table

        return call

    prepare, kernels = partial(ours, at.impl), ("append_rows",)
    keys = {"head_dim": problem.d}
    note = picked("kv_append", at.arch, **keys)
    yield Entry("triton", prepare, ours=True, kernels=kernels, on_cpu=True, note=note)
    yield Entry(
        "torch eager",
        partial(ours, "torch"),
        on_cpu=True,
        note="append_kv impl='torch'",
        capturable=problem.kind != "int4",
    )
    if problem.kind == "none" and not problem.norm:
        yield Entry("torch compiled", partial(peer, problem), on_cpu=True)
    for label, tile in variants("kv_append", at.arch, **keys) if not problem.extra else ():
        varied = with_tile("kv_append", tile, prepare)
        yield Entry(f"triton [{label}]", varied, ours=True, variant=True, kernels=kernels)


def peer(problem: Problem, inputs: Inputs) -> Any:
    """What one writes in torch: rotate, then index into the pages; the places are known before."""
    cache, table, device = inputs["cache"], inputs["table"], inputs["k"].device
    wipe(cache)
    position = (problem.held + torch.arange(problem.new, device=device)).repeat(problem.r)
    owner = torch.arange(problem.r, device=device).repeat_interleave(problem.new)
    page = table.pages[owner, position // cache.page].long()
    function = compiled(rotate_and_store, inputs["k"])
    arguments = *(inputs[n] for n in "qkv"), *inputs["rope"], position, page, position % cache.page

    def call() -> tuple:
        return function(*arguments, cache.data), cache, table

    return call


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    page: Tensor,
    slot: Tensor,
    data: Tensor,
) -> Tensor:
    c, s = cos[position][:, None], sin[position][:, None]
    q, k = ((x.float() * c + x.float().roll(x.shape[-1] // 2, -1) * s).to(x.dtype) for x in (q, k))
    data[page, 0, slot] = k
    data[page, 1, slot] = v
    return q


def _checked(problem: Problem) -> int:
    """New tokens of the last request that are read back: a last whole page of int4, if there is."""
    return min(problem.new, 2 * problem.page)


def oracle(problem: Problem, inputs: Inputs) -> Parts:
    """The last new tokens of the last request."""
    rows, length = _checked(problem), problem.held + problem.new
    positions = torch.arange(length - rows, length)

    def turned(name: str) -> Tensor:
        x = inputs[name][-rows:].double().cpu()
        if problem.norm:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            x = x * inputs[f"{name}_norm"].double().cpu()
        return rotated(x, positions)

    return {"q": turned("q"), "keys": turned("k"), "values": inputs["v"][-rows:].double().cpu()}


def parts(problem: Problem, result: tuple) -> Parts:
    q, cache, table = result
    rows, length, page = _checked(problem), problem.held + problem.new, problem.page
    first = (length - rows) // page
    tails = None if table.tails is None else table.tails[-1:]
    own = BlockTable(table.pages[-1:, first:], table.lengths[-1:] - first * page, tails)
    keys, values = dequantise(cache, own)[0]
    return {"q": q[-rows:].cpu(), "keys": keys[-rows:].cpu(), "values": values[-rows:].cpu()}
