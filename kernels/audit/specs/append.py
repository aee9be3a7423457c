"""Every tile of append, on its chip: bfloat16, with all that a call may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.audit.spec import Spec, specs_of
from kernels.kv_cache.append.launch import append
from kernels.kv_cache.layout import PagedKV, QuantSpec
from kernels.tiles import Row, rows

N, R, H, KV = 65536, 64, 32, 8
KINDS = {64: "int8", 128: "fp8", 256: "int4"}
"The kind of cache by head width; without fp8, none."


def specs() -> Iterator[Spec]:
    for row in rows("kv_append"):
        if row.arch != 0:
            kind, d = KINDS[row.keys["head_dim"]], row.keys["head_dim"]
            if kind == "fp8" and row.arch == 80:
                kind = "none"
            yield from _specs(row, "kv_append", "append_rows", kind, 64, d)
    for row in rows("kv_append_int4_keys"):
        if row.arch != 0:
            page = row.keys["page"]
            yield from _specs(row, "kv_append_int4_keys", "append_int4_keys", "int4", page, 256)


def _specs(row: Row, table: str, kernel: str, kind: str, page: int, d: int) -> list[Spec]:
    name = f"{kind} d{d} page {page}"
    return specs_of(row, (table,), call(kind, page, d), name, {kernel: None})


def call(kind: str, page: int, d: int, dtype: torch.dtype = torch.bfloat16) -> partial:
    """A launch with normalised and rotated queries and keys."""
    cache = PagedKV.create(
        8192, page, KV, d, dtype=dtype, quant=QuantSpec(kind), slots=R, device="meta"
    )
    qkv = meta(N, H + 2 * KV, d, dtype=dtype)
    table, weight = meta(131072, d, dtype=torch.float32), meta(d, dtype=dtype)
    ints = partial(meta, dtype=torch.int32)
    return partial(
        append,
        qkv[:, :H], qkv[:, H : H + KV], qkv[:, H + KV :], table, table, weight, weight, None,
        ints(R + 1), ints(R, 128), ints(R), ints(R) if kind == "int4" else None,
        cache.data, cache.scales, cache.key_scales, cache.key_zeros,
        cache.value_scales, cache.value_zeros, cache.tail, 1e-6, kind,
    )  # fmt: skip


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
