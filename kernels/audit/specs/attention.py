"""Every tile of attention, on its chip: plain causal, and with everything that adds code."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.attention.intervals import UNBOUNDED
from kernels.attention.launch import backward, forward
from kernels.audit.spec import Spec, specs_of
from kernels.tiles import Row, rows

B, T, H, KV = 2, 4096, 16, 4


TABLES = ("attention_forward", "attention_dq", "attention_dk_dv", "attention_prefix_dk_dv")


def specs() -> Iterator[Spec]:
    for table in TABLES:
        for row in rows(table):
            if row.arch != 0:
                for name, call in calls(row, forward if table == TABLES[0] else _backward):
                    yield from specs_of(row, (table,), call, name, {table: cores(table, row)})
    for row in rows("attention_delta"):
        if row.arch != 0:
            q = meta(B, T, H, 128, dtype=torch.bfloat16)
            call = partial(_backward, q, q, q, *(None,) * 4, UNBOUNDED, 0, 0.1, 0.0)
            yield from specs_of(row, (), call, "d128", {"attention_delta": None})


def cores(table: str, row: Row) -> str | None:
    """float32 is multiplied exactly, without tensor cores; below 64 rows the older ones serve."""
    if row.keys["bytes"] == 4:
        return None
    height = row.tile.blocks["BLOCK_N" if "dk_dv" in table else "BLOCK_M"]
    return "wide" if height >= 64 else "any"


def calls(row: Row, launcher) -> Iterator[tuple[str, partial]]:
    """For a row without softcap: a plain causal call, and one with a prefix, documents and sinks;
    for a row with: the latter with a softcap, which takes most registers."""
    d = row.keys["head_dim"]
    dtype = torch.float32 if row.keys["bytes"] == 4 else torch.bfloat16
    q, k, v = (meta(B, T, heads, d, dtype=dtype) for heads in (H, KV, KV))
    prefix = meta(2048, KV, d, dtype=dtype)
    intervals = meta(B, 2, T, dtype=torch.int32)
    sinks = meta(H, dtype=torch.float32)
    kind = f"{str(dtype).removeprefix('torch.')} d{d}"
    ragged = (q, k, v, prefix, prefix, sinks, intervals, UNBOUNDED, 0, 0.1)
    if row.keys["softcap"]:
        yield f"{kind} ragged softcap", partial(launcher, *ragged, 30.0)
    else:
        plain = (None, None, None, None, UNBOUNDED, 0, 0.1, 0.0)
        yield f"{kind} causal", partial(launcher, q, k, v, *plain)
        if row.tile.warp_specialize:  # one form only, without a prefix
            return
        yield f"{kind} ragged", partial(launcher, *ragged, 0.0)


def _backward(q, k, v, pk, pv, sinks, intervals, before, after, scale, softcap):
    lse = meta(B, H, T, dtype=torch.float32)
    return backward(
        q, lse, q, k, v, pk, pv, sinks, intervals, q, lse, before, after, scale, softcap
    )


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
