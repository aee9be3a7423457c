"""Every tile of the linear head's kernels, on its chip, with all that adds code."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.audit.spec import Spec, served, specs_of
from kernels.cross_entropy.launch import backward, forward
from kernels.tiles import Row, rows

N, D, VOCAB, K = 4096, 2048, 16384, 20


def specs() -> Iterator[Spec]:
    for table, launcher in (("linear_logsumexp", _forward), ("linear_dlogits", _backward)):
        for row in rows(table):
            if row.arch != 0:
                for name, call in calls(row, launcher):
                    yield from _specs(row, table, call, name)
    for row in rows("linear_selected"):
        call = partial(_forward, torch.bfloat16, 0.0, False)
        for each in served("linear_selected", row) if row.arch != 0 else ():
            yield from specs_of(
                each, ("linear_selected",), call, "bfloat16", {"linear_selected": None}
            )


def calls(row: Row, launcher: Any) -> Iterator[tuple[str, partial]]:
    """With a softcap and the entropy; on sm_90 also without either."""
    dtype = torch.float32 if row.keys["bytes"] == 4 else torch.bfloat16
    kind = str(dtype).removeprefix("torch.")
    if row.keys["bytes"] == 2 and row.arch == 90:
        yield f"{kind} plain", partial(launcher, dtype, 0.0, False)
    yield f"{kind} everything", partial(launcher, dtype, 30.0, True)


def _specs(row: Row, table: str, call: Any, name: str) -> list[Spec]:
    # float32 is multiplied exactly, without tensor cores.
    return specs_of(row, (table,), call, name, {table: "wide" if row.keys["bytes"] == 2 else None})


def _head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return meta(N, D, dtype=dtype), meta(VOCAB, D, dtype=dtype), meta(N, K, dtype=torch.int32)


def _forward(dtype: torch.dtype, softcap: float, entropy: bool) -> Any:
    return forward(*_head(dtype), 0.7, softcap, entropy)


def _backward(dtype: torch.dtype, softcap: float, entropy: bool) -> Any:
    selected, row = meta(N, K, dtype=torch.float32), meta(N, dtype=torch.float32)
    total = row if entropy else meta(0, dtype=torch.float32)
    return backward(
        selected, row, total, *_head(dtype), selected, row, total, 0.7, softcap, True, True
    )  # fmt: skip


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
