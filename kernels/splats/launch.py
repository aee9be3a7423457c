"""The compositing kernels as custom operators of torch.

    afferent::splat             image, left = ...             tiles: tuned/splat_forward.json
    afferent::splat_backward    dcenters .. dfeatures, sizes  tuned/splat_{backward,sum}.json

Besides its results the backward needs 4 (8 + f) bytes for each pair of a Gaussian and a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import arch
from kernels.launch import cdiv, launch
from kernels.splats.bins import Bins, Grid
from kernels.splats.composite import GEOMETRY
from kernels.splats.constants import ALPHA_CAP, ALPHA_LEAST, STOP
from kernels.tiles import pick

PRECISION = "tf32x3"
"Products of float32 as three of the tensor cores' own: no worse than float32 sums."


def composite(
    centers: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, probe: Tensor | None,
    bins: Bins, grid: Grid,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `composite.Composite`."""
    if probe is None:
        probe = centers.new_empty(0, 2)
    return splat(
        centers, conics, opacities, features, probe, bins.ids, bins.offsets, bins.slots, bins.order,
        bins.starts, grid.cameras, grid.width, grid.height, grid.tile,
    )  # fmt: skip


def forward(
    centers: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, ids: Tensor,
    offsets: Tensor, grid: Grid,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """image [c h w f] and left [c h w] of contiguous arguments."""
    from kernels.splats.triton import splat_forward

    shape = grid.cameras, grid.height, grid.width
    image, left = features.new_empty(*shape, features.shape[1]), features.new_empty(shape)
    tile = pick("splat_forward", arch(centers.device), features=features.shape[1])
    launch(
        splat_forward, (grid.tiles,), tile,
        **_shared(centers, conics, opacities, features, ids, offsets, grid), image=image, left=left,
        PADDED=max(16, 1 << (features.shape[1] - 1).bit_length()), PRECISION=PRECISION,
    )  # fmt: skip
    return image, left


def backward(
    dimage: Tensor, dleft: Tensor, image: Tensor, left: Tensor, centers: Tensor, conics: Tensor,
    opacities: Tensor, features: Tensor, ids: Tensor, offsets: Tensor, slots: Tensor, order: Tensor,
    starts: Tensor, grid: Grid, sizes: bool,
) -> Tensor:  # fmt: skip
    """Gradients [m, 8 + f]: centres, conics, opacities, sizes (or zeros), features."""
    from kernels.splats.triton import splat_backward, splat_sum

    chip, columns = arch(centers.device), GEOMETRY + features.shape[1]
    if not len(centers):
        return features.new_zeros(0, columns)
    shares = features.new_zeros(len(ids), columns)
    launch(
        splat_backward, (grid.tiles,), pick("splat_backward", chip, sizes=int(sizes)),
        **_shared(centers, conics, opacities, features, ids, offsets, grid), slots=slots,
        image=image, left=left, dimage=dimage, dleft=dleft, shares=shares, SIZES=sizes,
    )  # fmt: skip
    sums, tile = features.new_empty(len(centers), columns), pick("splat_sum", chip)
    launch(
        splat_sum, (cdiv(len(centers), tile.blocks["BLOCK_M"]),), tile, shares=shares, order=order,
        starts=starts, sums=sums, m=len(centers), COLUMNS=columns,
        PADDED=1 << (columns - 1).bit_length(),
    )  # fmt: skip
    return sums


def _shared(
    centers: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, ids: Tensor,
    offsets: Tensor, grid: Grid,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of both kernels over tiles."""
    f = features.shape[1]
    return {
        "centers": centers, "conics": conics, "opacities": opacities, "features": features,
        "ids": ids, "offsets": offsets, "columns": grid.columns, "rows": grid.rows,
        "width": grid.width, "height": grid.height, "FEATURES": f,
        "TILE": grid.tile, "CAP": ALPHA_CAP, "LEAST": ALPHA_LEAST, "STOP": STOP,
    }  # fmt: skip


@torch.library.custom_op("afferent::splat", mutates_args=())
def splat(
    centers: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, probe: Tensor,
    ids: Tensor, offsets: Tensor, slots: Tensor, order: Tensor, starts: Tensor,
    cameras: int, width: int, height: int, tile: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = (x.contiguous() for x in (centers, conics, opacities, features))
    return forward(*given, ids, offsets, Grid(cameras, width, height, tile))


@splat.register_fake
def _(centers, conics, opacities, features, probe, ids, offsets, slots, order, starts, *grid):
    cameras, width, height, _ = grid
    shape = cameras, height, width
    return features.new_empty(*shape, features.shape[1]), features.new_empty(shape)


@torch.library.custom_op("afferent::splat_backward", mutates_args=())
def splat_backward(
    dimage: Tensor, dleft: Tensor, image: Tensor, left: Tensor, centers: Tensor, conics: Tensor,
    opacities: Tensor, features: Tensor, ids: Tensor, offsets: Tensor, slots: Tensor,
    order: Tensor, starts: Tensor, cameras: int, width: int, height: int, tile: int, sizes: bool,
) -> Tensor:  # fmt: skip
    given = (
        x.contiguous() for x in (dimage, dleft, image, left, centers, conics, opacities, features)
    )
    grid = Grid(cameras, width, height, tile)
    return backward(*given, ids, offsets, slots, order, starts, grid, sizes)


@splat_backward.register_fake
def _(dimage, dleft, image, left, centers, conics, opacities, features, *options):
    return features.new_empty(len(centers), GEOMETRY + features.shape[1])


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    centers, conics, opacities, features, probe, *bins = inputs[:10]
    ctx.numbers, ctx.probed = inputs[10:], len(probe) > 0
    ctx.save_for_backward(*output, centers, conics, opacities, features, *bins)


def _differentiate(ctx: Any, dimage: Tensor, dleft: Tensor) -> tuple:
    sums = splat_backward(dimage, dleft, *ctx.saved_tensors, *ctx.numbers, ctx.probed)
    features = sums.shape[1] - GEOMETRY
    dcenters, dconics, dopacity, sizes, dfeatures = sums.split([2, 3, 1, 2, features], dim=1)
    return dcenters, dconics, dopacity[:, 0], dfeatures, sizes if ctx.probed else None, *[None] * 9


def _refuse_second(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("rasterize has first derivatives only")


splat.register_autograd(_differentiate, setup_context=_save)
splat_backward.register_autograd(_refuse_second, setup_context=lambda *_, **__: None)
