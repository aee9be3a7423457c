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


def specs() -> Iterator[Spec]:
    for row in rows("attention_forward"):
        if row.arch != 0:
            for name, call in calls(row, forward):
                # Warp specialisation has one form: without a prefix.
                if not (row.tile.warp_specialize and "everything" in name):
                    yield from _specs(row, "attention_forward", call, name)
    for table in ("attention_dq", "attention_dk_dv"):
        for row in rows(table):
            if row.arch != 0:
                for name, call in calls(row, _backward):
                    yield from _specs(row, table, call, name)


def calls(row: Row, launcher) -> Iterator[tuple[str, partial]]:
    """A plain causal call for the row, and one with a prefix, documents, sinks and a softcap."""
    d = row.keys["head_dim"]
    dtype = torch.float32 if row.keys["bytes"] == 4 else torch.bfloat16
    q, k, v, out = (meta(B, T, heads, d, dtype=dtype) for heads in (H, KV, KV, H))
    prefix = meta(2048, KV, d, dtype=dtype)
    intervals = meta(B, 2, T, dtype=torch.int32)
    sinks = meta(H, dtype=torch.float32)
    kind = f"{str(dtype).removeprefix('torch.')} d{d}"
    plain = (None, None, None, None, UNBOUNDED, 0, 0.1, 0.0)
    everything = (prefix, prefix, sinks, intervals, UNBOUNDED, 0, 0.1, 30.0)
    yield f"{kind} causal", partial(launcher, q, k, v, *plain)
    yield f"{kind} everything", partial(launcher, q, k, v, *everything)


def _backward(q, k, v, pk, pv, sinks, intervals, before, after, scale, softcap):
    lse = meta(B, H, T, dtype=torch.float32)
    return backward(
        q, lse, q, k, v, pk, pv, sinks, intervals, q, lse, before, after, scale, softcap
    )


def _specs(row: Row, table: str, call, name: str) -> list[Spec]:
    # float32 is multiplied exactly, without tensor cores.
    cores = "wide" if row.keys["bytes"] == 2 else None
    tables = {
        "attention_forward": {"attention_forward": cores},
        "attention_dq": {"attention_dq": cores},
        "attention_dk_dv": {"attention_dk_dv": cores, "attention_prefix_dk_dv": cores},
    }
    return specs_of(row, (table,), call, name, tables[table])


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
