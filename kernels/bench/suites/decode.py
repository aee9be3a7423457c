"""Decoding over a paged cache: one query for each request, keys and values in each storage format.

A memory-bound op: every cached byte is read once. Floating-point operations: 4 d for each query
head and key. Bytes: keys, values and their scales, q, out and the block table. The formats hold the
same keys and values and are timed in turn; each is held against an oracle on what it stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, decode_paged, extend_paged
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
    picked,
    variants,
    with_tile,
)
from kernels.bench.pages import bytes_per_token, paged, restored
from kernels.bench.peers import SDPA_KERNELS, sdpa_backend
from kernels.parity.case import CAPS

SOURCES = (
    "kv_cache/attention/*.py",
    "kv_cache/*.py",
    "attention/*merge*.py",
    "tuned/merge_states.json",
    "tuned/paged_*.json",
    "language.py",
    "launch.py",
    "tiles.py",
)
KERNEL = ("paged_attention",)
QUANTISED = {"int8": 1.7, "fp8": 1.7, "int4": 2.6}
"Format -> how many times as fast as bfloat16 it is asked to be."


@dataclass(frozen=True)
class Problem:
    """r requests of s tokens."""

    name: str
    r: int
    s: int
    h: int
    kv: int
    d: int
    page: int = 64
    t: int = 1
    "Queries of each request, its last tokens."
    kinds: tuple[str, ...] = ("none",)
    dtype: torch.dtype = torch.bfloat16
    targets: tuple[Target, ...] = ()
    extra: bool = False

    @property
    def shapes(self) -> dict[str, int | str]:
        sizes = {"r": self.r, "s": self.s, "h": self.h, "kv": self.kv, "d": self.d}
        return sizes | {"page": self.page} | ({"t": self.t} if self.t > 1 else {})


def problems(at: Setting) -> Iterator[Problem]:
    n = at.length
    heads = {"h": at.size(32, 4), "kv": at.size(8, 2), "d": at.size(128, 32)}
    heads["page"] = at.size(64, 16)
    kinds = tuple(kind for kind in QUANTISED if kind != "fp8" or has_fp8(at.arch))
    yield Problem(
        "paged",
        at.size(64, 3),
        n(8192, 64),
        **heads,
        kinds=("none", *kinds),
        targets=(
            Target("paged decode >= 0.88 of copy bandwidth", 0.88, ceiling="copy"),
            *(
                Target(f"{kind} decode >= {least}x bf16", least, f"triton {kind}", over="triton")
                for kind, least in QUANTISED.items()
            ),
        ),
    )
    yield Problem("one long request", 1, n(65536, 96), **heads, extra=True)
    yield Problem("small pages", at.size(64, 2), n(4096, 32), **{**heads, "page": 16}, extra=True)
    yield Problem("extend 512", at.size(8, 2), n(8192, 64), **heads, t=n(512, 16), extra=True)


def has_fp8(arch: int | str) -> bool:
    """Whether the chip has float8 e4m3fn: sm_89 and later; a CPU computes it too."""
    return isinstance(arch, int) and (arch == 0 or arch >= 89)


def cases(at: Setting) -> Iterator[Case]:
    for problem in problems(at):
        yield Case(
            "decode",
            problem.name,
            problem.shapes,
            problem.dtype,
            work(problem, "none"),
            partial(draw, problem),
            partial(oracle, problem, "none"),
            partial(parts, problem),
            CAPS[problem.dtype][0],
            tuple(entries(problem, at)),
            problem.targets,
            SOURCES,
            footprint=sum(work(problem, kind).bytes for kind in problem.kinds),
            extra=problem.extra,
        )


def work(problem: Problem, kind: str) -> Work:
    r, s, t, h, d = problem.r, problem.s, problem.t, problem.h, problem.d
    size, pairs = problem.dtype.itemsize, t * s - t * (t - 1) // 2
    stored = bytes_per_token(kind, size, problem.page, problem.kv, d) * r * s
    other = 2 * r * t * h * d * size + 4 * r * (s // problem.page + 1)
    return Work(4.0 * d * r * h * pairs, stored + other)


def draw(problem: Problem, device: torch.device, seed: int) -> Inputs:
    rng, dtype = generator(device, seed), problem.dtype
    k, v = (normal(rng, problem.r, problem.s, problem.kv, problem.d, dtype=dtype) for _ in range(2))
    inputs: Inputs = {"k": k, "v": v}
    inputs["q"] = normal(rng, problem.r * problem.t, problem.h, problem.d, dtype=dtype)
    inputs["cu_seqlens"] = torch.arange(problem.r + 1, dtype=torch.int32) * problem.t
    for kind in problem.kinds:
        inputs[kind] = paged(k, v, problem.page, kind, seed)
    return inputs


def entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    for kind in problem.kinds:
        yield ours(problem, at, kind)
    if problem.t == 1:
        for backend in SDPA_KERNELS:
            kernels = SDPA_KERNELS[backend][0]
            yield Entry(
                f"sdpa {backend} on dense keys",
                partial(dense, problem, backend),
                kernels=kernels,
                on_cpu=True,
            )
        yield Entry(
            "gather and sdpa flash",
            partial(gathered, problem),
            kernels=SDPA_KERNELS["flash"][0],
            on_cpu=True,
            note="the pages are gathered in the timed call",
        )
        entry = ours(problem, at, "none")
        table, keys = tiles(problem, "none")
        for label, tile in variants(table, at.arch, **keys):
            prepare = with_tile(table, tile, entry.prepare)
            yield Entry(f"triton [{label}]", prepare, ours=True, variant=True, kernels=KERNEL)
    else:
        yield Entry(
            "own attention on dense keys",
            partial(own_dense, problem, at.impl),
            on_cpu=True,
            kernels=("attention_forward",),
        )


def tiles(problem: Problem, kind: str) -> tuple[str, dict[str, int]]:
    """The tile table of a call, and its keys there."""
    size = problem.dtype.itemsize
    if problem.t == 1:
        return "paged_decode", {"bytes": size, "head_dim": problem.d}
    bits = {"none": 8 * size, "int8": 8, "fp8": 8, "int4": 4}[kind]
    return "paged_extend", {"head_dim": problem.d, "bits": bits}


def ours(problem: Problem, at: Setting, kind: str) -> Entry:
    def prepare(inputs: Inputs) -> Any:
        cache, table = inputs[kind]
        q, cu_seqlens = inputs["q"], inputs["cu_seqlens"].to(cache.device)
        if problem.t == 1:
            return lambda: decode_paged(q, cache, table, impl=at.impl)
        return lambda: extend_paged(q, cache, table, cu_seqlens=cu_seqlens, impl=at.impl)

    table, keys = tiles(problem, kind)
    return Entry(
        "triton" if kind == "none" else f"triton {kind}",
        prepare,
        ours=True,
        kernels=KERNEL,
        on_cpu=True,
        note=picked(table, at.arch, **keys),
        work=None if kind == "none" else work(problem, kind),
        expected=None if kind == "none" else partial(oracle, problem, kind),
    )


def dense(problem: Problem, backend: str, inputs: Inputs) -> Any:
    """SDPA on keys and values that are dense already."""
    q = inputs["q"][:, :, None]  # [r, h, 1, d]
    k, v = (inputs[name].transpose(1, 2) for name in ("k", "v"))

    def call() -> Tensor:
        with sdpa_backend(backend, q):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=problem.h != problem.kv)[
                :, :, 0
            ]

    return call


def gathered(problem: Problem, inputs: Inputs) -> Any:
    """What a user without a paged kernel writes."""
    cache, table = inputs["none"]
    q, pages = inputs["q"][:, :, None], table.pages.long()

    def call() -> Tensor:
        both = cache.data[pages].transpose(1, 2).flatten(2, 3)  # [r, 2, s, kv, d]
        k, v = (both[:, side].transpose(1, 2) for side in range(2))
        with sdpa_backend("flash", q):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=problem.h != problem.kv)[
                :, :, 0
            ]

    return call


def own_dense(problem: Problem, impl: str, inputs: Inputs) -> Any:
    """Our attention on contiguous keys: what paging costs."""
    q = inputs["q"].unflatten(0, (problem.r, problem.t))
    return lambda: attention(q, inputs["k"], inputs["v"], impl=impl).flatten(0, 1)


def oracle(problem: Problem, kind: str, inputs: Inputs) -> Parts:
    """The last request, on what a cache of this kind holds of it."""
    k, v = restored(inputs["k"][-1], inputs["v"][-1], problem.page, kind)
    q = inputs["q"][-problem.t :].double()
    out, _ = reference.attention(q[None], k[None], v[None])
    return {"last request": out[0]}


def parts(problem: Problem, out: Tensor) -> Parts:
    return {"last request": out[-problem.t :]}
