"""Every tile of the compositing kernels, on its chip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.audit.spec import Spec, served, specs_of
from kernels.splats.bins import Grid
from kernels.splats.launch import backward, forward
from kernels.tiles import rows

GAUSSIANS, PAIRS, GRID = 4096, 65_536, Grid(2, 800, 800, 16)


def specs() -> Iterator[Spec]:
    for features in (4, 64):
        for sizes in (False, True):
            yield from _specs(features, sizes)


def _specs(features: int, sizes: bool) -> Iterator[Spec]:
    given = [meta(GAUSSIANS, k) for k in (2, 3)] + [meta(GAUSSIANS), meta(GAUSSIANS, features)]
    ids, order = integers(PAIRS), integers(GAUSSIANS)
    offsets, starts = integers(GRID.tiles + 1), integers(GAUSSIANS + 1)
    shape = GRID.cameras, GRID.height, GRID.width
    images = [meta(*shape, features), meta(*shape)]
    back = partial(
        backward, *images, *images, *given, ids, offsets, ids, order, starts, GRID, sizes
    )
    calls = {"splat_backward": back}
    if not sizes:
        calls |= {"splat_forward": partial(forward, *given, ids, offsets, GRID), "splat_sum": back}
    for table, call in calls.items():
        name = f"{features} features" + " sizes" * sizes
        for row in rows(table):
            if (
                row.keys.get("features", features) < features
                or row.keys.get("sizes", sizes) != sizes
            ):
                continue
            for each in served(table, row) if row.arch != 0 else ():
                yield from specs_of(each, (table,), call, name, {table: None})


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def integers(count: int) -> Tensor:
    return torch.empty(count, device="meta", dtype=torch.int32)
