"""Decoding behind a shared prefix: read once for its group (cascade), or once for each request.

Bytes of the cascade: every prefix once, each request's own tokens, q and out; of flat decoding: the
prefix for each request. Both run on the same pages. With many query rows over one prefix the
cascade is bound by matrix products instead: 4 d for each query head and key, either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import decode_cascade, decode_paged
from kernels.attention import reference
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
)
from kernels.bench.pages import bytes_per_token, empty_cache, restored, store, table_of
from kernels.bench.suites.decode import KERNEL, SOURCES
from kernels.parity.case import CAPS

OVER_FLAT = Target("cascade >= 20x flat decoding", 20.0, over="flat decode_paged")


@dataclass(frozen=True)
class Problem:
    """groups x each requests; p tokens of prefix, then s of their own."""

    name: str
    groups: int
    each: int
    p: int
    s: int
    h: int
    kv: int
    d: int
    page: int
    kind: str = "none"
    targets: tuple[Target, ...] = ()
    extra: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def r(self) -> int:
        return self.groups * self.each


def problems(at: Setting) -> Iterator[Problem]:
    n, heads = at.length, {"h": at.size(32, 4), "kv": at.size(8, 2), "d": at.size(128, 32)}
    heads["page"] = at.size(64, 16)
    many, own = at.size(64, 3), n(256, 16)
    yield Problem(
        "64 requests, 32k prefix", 1, many, n(32768, 64), own, **heads, targets=(OVER_FLAT,)
    )
    yield Problem(
        "64 requests, 32k prefix int8", 1, many, n(32768, 64), own, **heads, kind="int8", extra=True
    )
    yield Problem(
        "8 groups of 16, 8k prefix",
        at.size(8, 2),
        at.size(16, 2),
        n(8192, 48),
        own,
        **heads,
        extra=True,
    )
    yield Problem("4 requests, 8k prefix", 1, at.size(4, 2), n(8192, 32), own, **heads, extra=True)


def cases(at: Setting) -> Iterator[Case]:
    for problem in problems(at):
        shapes = {"r": problem.r, "groups": problem.groups, "p": problem.p, "s": problem.s}
        shapes |= {"h": problem.h, "kv": problem.kv, "d": problem.d, "page": problem.page}
        yield Case(
            "cascade",
            problem.name,
            shapes,
            problem.dtype,
            work(problem, flat=False),
            partial(draw, problem),
            partial(oracle, problem),
            parts,
            CAPS[problem.dtype][1],  # the torch path rounds both parts before it merges them
            entries(problem, at),
            problem.targets,
            SOURCES,
            extra=problem.extra,
        )


def work(problem: Problem, *, flat: bool) -> Work:
    r, h, d, size = problem.r, problem.h, problem.d, problem.dtype.itemsize
    prefixes = r if flat else problem.groups
    tokens = prefixes * problem.p + r * problem.s
    stored = tokens * bytes_per_token(problem.kind, size, problem.page, problem.kv, d)
    return Work(4.0 * d * r * h * (problem.p + problem.s), stored + 2 * r * h * d * size)


def draw(problem: Problem, device: torch.device, seed: int) -> Inputs:
    rng, dtype = generator(device, seed), problem.dtype
    kv, d, page, r = problem.kv, problem.d, problem.page, problem.r

    def pair(count: int, length: int) -> list[Tensor]:
        return [normal(rng, count, length, kv, d, dtype=dtype) for _ in range(2)]

    shared, own = pair(problem.groups, problem.p), pair(r, problem.s)
    columns, more = problem.p // page, problem.s // page
    order = torch.randperm(
        problem.groups * columns + r * more, generator=torch.Generator().manual_seed(seed)
    )
    prefix_pages = order[: problem.groups * columns].view(problem.groups, columns)
    own_pages = order[problem.groups * columns :].view(r, more)
    cache = empty_cache(len(order), page, own[0], problem.kind, r)
    for pages, (k, v) in ((prefix_pages, shared), (own_pages, own)):
        for row, keys, values in zip(pages, k, v, strict=True):
            store(cache, row, keys, values)
    flat = torch.cat([prefix_pages.repeat_interleave(problem.each, 0), own_pages], dim=1)
    return {
        "q": normal(rng, r, problem.h, d, dtype=dtype),
        "cache": cache,
        "own": table_of(own_pages, [problem.s] * r, cache),
        "prefix": table_of(prefix_pages, [problem.p] * problem.groups, cache),
        "flat": table_of(flat, [problem.p + problem.s] * r, cache),
        "groups": torch.arange(problem.groups + 1, dtype=torch.int32) * problem.each,
        "last": [torch.cat([x[-1], y[-1]]) for x, y in zip(shared, own, strict=True)],
    }


def entries(problem: Problem, at: Setting) -> tuple[Entry, ...]:
    def cascade(inputs: Inputs) -> Any:
        groups = inputs["groups"].to(inputs["q"].device)
        return lambda: decode_cascade(
            inputs["q"],
            inputs["cache"],
            inputs["own"],
            prefix=inputs["prefix"],
            groups=groups,
            impl=at.impl,
        )

    def flat(inputs: Inputs) -> Any:
        return lambda: decode_paged(inputs["q"], inputs["cache"], inputs["flat"], impl=at.impl)

    return (
        Entry("triton", cascade, ours=True, kernels=KERNEL, on_cpu=True),
        Entry(
            "flat decode_paged",
            flat,
            ours=True,
            kernels=KERNEL,
            on_cpu=True,
            work=work(problem, flat=True),
            note="our own kernel, the prefix read for each request",
        ),
    )


def oracle(problem: Problem, inputs: Inputs) -> Parts:
    """The last request: what is cached of its prefix and of its own tokens."""
    k, v = restored(*inputs["last"], problem.page, problem.kind)
    out, _ = reference.attention(inputs["q"][-1:].double()[None], k[None], v[None])
    return {"last request": out[0]}


def parts(out: Tensor) -> Parts:
    return {"last request": out[-1:]}
