"""Every tile of TTT-Linear's kernels, on its chip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.audit.spec import Spec, served, specs_of
from kernels.fast_weights.ttt.launch import backward, forward
from kernels.fast_weights.ttt.op import LONGEST
from kernels.tiles import rows

B, T, H = 2, 4096, 8
FORWARD, BACKWARD = ("ttt_states", "ttt_outputs"), ("ttt_dreads", "ttt_dstates", "ttt_dwrites")


def specs() -> Iterator[Spec]:
    for table in (*FORWARD, *BACKWARD):
        for row in rows(table):
            for each in served(table, row) if row.arch != 0 else ():
                dtype = torch.float32 if row.keys["bytes"] == 4 else torch.bfloat16
                d = row.keys["width"]
                call = partial(_forward if table in FORWARD else _backward, dtype, d)
                name = f"{str(dtype).removeprefix('torch.')} d{d}"
                yield from specs_of(each, (table,), call, name, {table: cores(table, dtype)})


def cores(table: str, dtype: torch.dtype) -> str | None:
    """float32 is multiplied exactly, without tensor cores; scores of 16 tokens are too few rows."""
    if dtype == torch.float32:
        return None
    return "any" if table in ("ttt_outputs", "ttt_dreads") else "wide"


def _inputs(dtype: torch.dtype, d: int) -> tuple[Tensor, ...]:
    """q, k, v, rate, position."""
    x = meta(B, T, H, d, dtype=dtype)
    return x, x, x, meta(B, T, H, dtype=dtype), meta(LONGEST)


def _forward(dtype: torch.dtype, d: int) -> Any:
    return forward(*_inputs(dtype, d), meta(B, H, d, d), meta(B, H, d), meta(H, d), meta(H, d))


def _backward(dtype: torch.dtype, d: int) -> Any:
    n = T // LONGEST
    kept = meta(B, H, n, d, d, dtype=dtype), meta(B, H, n, d), meta(B, H, T, d, dtype=dtype)
    last = meta(B, H, d, d), meta(B, H, d)
    dout = meta(B, T, H, d, dtype=dtype)
    return backward(dout, *last, *_inputs(dtype, d), meta(H, d), meta(H, d), *kept)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
