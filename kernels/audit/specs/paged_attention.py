"""Attention over pages and the merge: every row of their tables, and more of what a row serves.

A row serves all kinds of cache, page sizes and options, and newer chips: the rows of heads of 128,
which most models have, are compiled for each kind, the others for the one that takes most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kernels.attention import merge
from kernels.attention.intervals import UNBOUNDED
from kernels.audit.spec import Spec, served, specs_of
from kernels.kv_cache.attention import launch
from kernels.kv_cache.layout import PagedKV, QuantSpec
from kernels.tiles import Row, rows

REQUESTS, QUERIES, KV, GROUP, LONGEST = 64, 4096, 8, 4, 8192


def specs() -> Iterator[Spec]:
    for row in rows("paged_decode"):
        if row.arch == 0:
            continue
        for each in served("paged_decode", row):
            yield from _specs(each, "paged_decode", "none")
        if row.keys["bytes"] == 2 and row.keys["head_dim"] == 128 and not row.candidate:
            for kind, page in (("none", 16), ("int8", 64), ("fp8", 64), ("int4", 64)):
                yield from _specs(replace(row, arch=90), "paged_decode", kind, page)
            yield from _specs(replace(row, arch=100), "paged_decode", "fp8")
    for row in rows("paged_extend"):
        if row.arch != 0:
            eight = "int8" if row.arch == 80 else "fp8"
            kind = {4: "int4", 8: eight, 16: "none"}[row.keys["bits"]]
            for each in served("paged_extend", row):
                yield from _specs(each, "paged_extend", kind)
    for row in rows("merge_states"):
        if row.arch != 0:
            for each in served("merge_states", row):
                yield from _merge_specs(each)


def _specs(row: Row, table: str, kind: str, page: int = 64) -> Iterator[Spec]:
    d, dtype = row.keys["head_dim"], torch.bfloat16
    if row.keys.get("bytes") == 4:
        dtype = torch.float32
    wide = row.tile.blocks["BLOCK_M"] >= 64
    cores = "wide" if wide else None if dtype == torch.float32 else "any"
    call = partial(attend, table == "paged_extend", kind, page, d, dtype)
    name = f"{kind} {str(dtype).removeprefix('torch.')} d{d} page {page}"
    yield from specs_of(row, (table,), call, name, {"paged_attention": cores})


def attend(extend: bool, kind: str, page: int, d: int, dtype: torch.dtype) -> None:
    """Decoding with nothing besides, or extending with a window, sinks and a softcap."""
    slots = REQUESTS if kind == "int4" else 0
    cache = PagedKV.create(
        4096, page, KV, d, dtype=dtype, quant=QuantSpec(kind), slots=slots, device="meta"
    )
    tails = meta(REQUESTS, dtype=torch.int32) if slots else None
    pages = meta(REQUESTS, LONGEST // page, dtype=torch.int32)
    table = [pages, meta(REQUESTS, dtype=torch.int32), tails]
    q = meta(QUERIES if extend else REQUESTS, KV * GROUP, d, dtype=dtype)
    cu_seqlens = meta(REQUESTS + 1, dtype=torch.int32) if extend else None
    sinks = meta(KV * GROUP, dtype=torch.float32) if extend else None
    options = launch.Options(1024 if extend else UNBOUNDED, 0, d**-0.5, 30.0 if extend else 0.0)
    launch.forward(q, launch.tensors_of(cache), table, cu_seqlens, sinks, 1, options)


def _merge_specs(row: Row) -> Iterator[Spec]:
    d = row.keys["head_dim"]
    outs, lses = meta(8, 1, REQUESTS, KV * GROUP, d), meta(8, 1, KV * GROUP, REQUESTS)
    out = meta(1, REQUESTS, KV * GROUP, d, dtype=torch.bfloat16)
    sinks = meta(KV * GROUP)
    forward = partial(merge.forward, outs, lses, out, lses[0], sinks)
    yield from specs_of(row, ("merge_states",), forward, f"d{d}", {"merge_forward": None})
    backward = partial(merge.backward, out, lses[0], outs.bfloat16(), lses)
    yield from specs_of(row, ("merge_states",), backward, f"d{d}", {"merge_backward": None})


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
