"""Every tile of the characteristic function's kernels, on its chip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.audit.spec import Spec, served, specs_of
from kernels.sigreg.op import backward, forward
from kernels.tiles import rows

G, N, K, KNOTS, STEP = 4, 256, 1024, 17, 3 / 16


def specs() -> Iterator[Spec]:
    h = meta(G, N, K)
    averages = meta(G, KNOTS, K)
    calls = {
        "ecf_forward": partial(forward, h, STEP, KNOTS),
        "ecf_backward": partial(backward, averages, averages, h, STEP, KNOTS),
    }
    for table, call in calls.items():
        for row in rows(table):
            for each in served(table, row) if row.arch != 0 else ():
                yield from specs_of(each, (table,), call, f"{KNOTS} knots", {table: None})


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
