"""Every tile of the gated delta rule's kernels, on its chip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.audit.spec import Spec, served, specs_of
from kernels.fast_weights.gated_delta.launch import backward, chunk, forward
from kernels.tiles import Row, rows

B, T, H = 2, 4096, 8
FORWARD = ("delta_solve", "delta_states", "delta_outputs")
BACKWARD = ("delta_dstates", "delta_dqueries", "delta_dkeys", "delta_dvalues")


def specs() -> Iterator[Spec]:
    for table in (*FORWARD, *BACKWARD):
        for row in rows(table):
            for each in served(table, row) if row.arch != 0 else ():
                dtype = torch.float32 if row.keys["bytes"] == 4 else torch.bfloat16
                launcher = _forward if table in FORWARD else _backward
                call = partial(launcher, dtype, row.keys["width"])
                name = f"{str(dtype).removeprefix('torch.')} d{row.keys['width']}"
                yield from specs_of(each, (table,), call, name, {table: cores(each, dtype)})


def cores(row: Row, dtype: torch.dtype) -> str | None:
    """float32 is multiplied exactly, without tensor cores; chunks are 64 rows, which any take."""
    return "any" if dtype == torch.bfloat16 else None


def _inputs(dtype: torch.dtype, d: int) -> tuple[Tensor, ...]:
    x, rate = meta(B, T, H, d, dtype=dtype), meta(B, T, H, dtype=dtype)
    return x, x, x, rate, meta(B, T, H, dtype=torch.float32)


def _forward(dtype: torch.dtype, d: int) -> Any:
    return forward(*_inputs(dtype, d), meta(B, H, d, d, dtype=torch.float32), 0.1)


def _backward(dtype: torch.dtype, d: int) -> Any:
    state = meta(B, H, d, d, dtype=torch.float32)
    c = chunk(meta(B, T, H, d, dtype=dtype))
    n = T // c
    solved, states = meta(B, H, n, c, c, dtype=dtype), meta(B, H, n, d, d, dtype=dtype)
    corrections = meta(B, H, T, d, dtype=dtype)
    return backward(
        meta(B, T, H, d, dtype=dtype), state, *_inputs(dtype, d), solved, states, corrections, 0.1
    )


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
