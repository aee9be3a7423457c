"""Compositing on any device in plain torch, a few tiles at a time, with gradients written out.

Of a tile with pixels p and Gaussians i, nearest first:

    sigma_ip = 1/2 (a dx^2 + c dy^2) + b dx dy           below 0, by rounding alone, it is 0
    alpha_ip = min(ALPHA_CAP, o exp(-sigma)), or 0 below ALPHA_LEAST
    P_ip     = prod_j<=i (1 - alpha_jp)                  i is there while P_ip > STOP
    w_ip     = alpha_ip P_ip / (1 - alpha_ip)            image_p = sum_i w_ip f_i, left_p = min P_ip

    S_ip     = sum_j>i w_jp (f_j . g_p) + left_p g'_p    g, g': gradients of image and left
    dalpha   = P_ip / (1 - alpha_ip) (f_i . g_p) - S_ip / (1 - alpha_ip)
    v        = -alpha dalpha, where the cap does not hold it

S is what the tile has in all less what has been composited, so that nothing is stored and all of it
goes from front to back. What geometry learns is in six moments of v over the pixels, those of 1, x,
y, x^2, xy and y^2 from the tile's middle. float64 stays float64.

Dimensions: c cameras, m Gaussians of all of them, f features; t tiles, k Gaussians of a tile, q x q
its s pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.splats.bins import Bins, Grid
from kernels.splats.constants import ALPHA_CAP, ALPHA_LEAST, STOP

AT_ONCE = 2**19
"Pairs of a pixel and a Gaussian that are computed at a time."

GEOMETRY = 8
"Numbers of a row that are the geometry's: centre (2), conic (3), opacity, sizes (2)."


@dataclass(frozen=True)
class Some:
    """A few tiles, and their Gaussians, padded to those of the longest."""

    tiles: Int[Tensor, " t"]
    pairs: Int[Tensor, "t k"]
    ids: Int[Tensor, "t k"]
    real: Bool[Tensor, "t k"]


@dataclass(frozen=True)
class Shares:
    """What Gaussians cover of pixels."""

    dx: Float[Tensor, "t k 1 q"]
    dy: Float[Tensor, "t k q 1"]
    raw: Float[Tensor, "t k s"]
    "o exp(-sigma), before the cap."
    alpha: Float[Tensor, "t k s"]
    before: Float[Tensor, "t k s"]
    "Light that reaches the Gaussian."
    weights: Float[Tensor, "t k s"]
    left: Float[Tensor, "t s"]


class Composite(torch.autograd.Function):
    """image [c h w f] and left [c h w] of Gaussians; their gradients, and those of `probe`:
    whatever it is, sums over pixels of the sizes of what centres learn (AbsGS, 2024,
    arXiv:2404.10484)."""

    @staticmethod
    def forward(
        ctx: Any,
        centers: Float[Tensor, "m 2"],
        conics: Float[Tensor, "m 3"],
        opacities: Float[Tensor, " m"],
        features: Float[Tensor, "m f"],
        probe: Float[Tensor, "m 2"] | None,
        bins: Bins,
        grid: Grid,
    ) -> tuple[Float[Tensor, "c h w f"], Float[Tensor, "c h w"]]:
        image = features.new_zeros(grid.tiles, grid.tile**2, features.shape[1])
        left = features.new_ones(grid.tiles, grid.tile**2)
        for some in batches(bins, grid):
            found = shares(some, centers, conics, opacities, grid)
            image[some.tiles] = found.weights.transpose(1, 2) @ features[some.ids]
            left[some.tiles] = found.left
        ctx.save_for_backward(centers, conics, opacities, features, image, left)
        ctx.bins, ctx.grid = bins, grid
        return whole(image, grid), whole(left[..., None], grid)[..., 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dimage: Tensor, dleft: Tensor) -> tuple[Tensor | None, ...]:
        centers, conics, opacities, features, image, left = ctx.saved_tensors
        bins, grid, probed = ctx.bins, ctx.grid, ctx.needs_input_grad[4]
        dimage, dleft = tiled(dimage, grid), tiled(dleft[..., None], grid)[..., 0]
        rest = (image * dimage).sum(-1) + left * dleft  # [tiles s]
        rows = image.new_zeros(len(bins.ids), GEOMETRY + features.shape[1])
        for some in batches(bins, grid):
            found, g = shares(some, centers, conics, opacities, grid), dimage[some.tiles]
            value = features[some.ids] @ g.transpose(1, 2)  # [t k s]
            behind = rest[some.tiles][:, None] - (found.weights * value).cumsum(1)
            v = found.alpha * (behind / (1 - found.alpha) - found.before * value)
            v = torch.where((found.weights > 0) & (found.raw <= ALPHA_CAP), v, 0.0)
            own = geometry(some, found, v, centers, conics, opacities, grid, probed)
            row = torch.cat([own, found.weights @ g], dim=-1)
            rows[bins.slots[some.pairs[some.real]].long()] = row[some.real]
        dcenters, dconics, dopacity, sizes, dfeatures = sum_rows(rows, bins).split(
            [2, 3, 1, 2, features.shape[1]], dim=1
        )
        return dcenters, dconics, dopacity[:, 0], dfeatures, sizes if probed else None, None, None


def batches(bins: Bins, grid: Grid) -> Iterator[Some]:
    """Tiles that have any Gaussian, about equally many in each of a batch."""
    starts, counts = bins.offsets[:-1].long(), bins.offsets.diff()
    by_length = torch.argsort(counts, stable=True)
    lengths = counts[by_length].tolist()
    first = next((i for i, length in enumerate(lengths) if length), len(lengths))
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and (last + 1 - first) * lengths[last] * grid.tile**2 <= AT_ONCE:
            last += 1
        tiles = by_length[first:last]
        place = torch.arange(lengths[last - 1], device=tiles.device)
        real = place < counts[tiles][:, None]
        pairs = torch.where(real, starts[tiles][:, None] + place, 0)
        yield Some(tiles, pairs, bins.ids[pairs].long(), real)
        first = last


def middles(tiles: Int[Tensor, " t"], grid: Grid) -> Float[Tensor, "t 2"]:
    """Of tiles, in pixels of their images."""
    x, y = tiles % grid.columns, tiles // grid.columns % grid.rows
    return torch.stack([x, y], dim=-1) * grid.tile + grid.tile / 2


def steps(grid: Grid, like: Tensor) -> Float[Tensor, " q"]:
    """Pixels of a tile, from its middle."""
    return torch.arange(grid.tile, dtype=like.dtype, device=like.device) + (1 - grid.tile) / 2


def shares(some: Some, centers: Tensor, conics: Tensor, opacities: Tensor, grid: Grid) -> Shares:
    """The equations above, of all pixels of some tiles."""
    a, b, c = (conics[some.ids][..., None, None, i] for i in range(3))
    o = torch.where(some.real, opacities[some.ids], 0.0)[..., None, None]
    off = centers[some.ids] - middles(some.tiles, grid)[:, None]
    dx = steps(grid, centers) - off[..., 0, None, None]
    dy = steps(grid, centers)[:, None] - off[..., 1, None, None]
    sigma = (b * dx * dy).add_(0.5 * a * dx * dx).add_(0.5 * c * dy * dy)
    raw = sigma.clamp_min_(0).neg_().exp_().mul_(o).flatten(2)
    alpha = raw.clamp_max(ALPHA_CAP)
    alpha.mul_(alpha >= ALPHA_LEAST)
    passed = 1 - alpha
    light = passed.cumprod(1)
    there = light > STOP
    before = light / passed
    weights = torch.where(there, alpha * before, 0.0)
    left = torch.where(there, light, 1.0).amin(1)
    return Shares(dx, dy, raw, alpha, before, weights, left)


def geometry(
    some: Some,
    found: Shares,
    v: Float[Tensor, "t k s"],
    centers: Tensor,
    conics: Tensor,
    opacities: Tensor,
    grid: Grid,
    probed: bool,
) -> Float[Tensor, "t k 8"]:
    """What v, the gradient of sigma, tells centres, conics and opacities."""
    x, y = steps(grid, v).repeat(grid.tile), steps(grid, v).repeat_interleave(grid.tile)
    basis = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)
    m, mx, my, mxx, mxy, myy = (v @ basis).unbind(-1)
    x, y = (centers[some.ids] - middles(some.tiles, grid)[:, None]).unbind(-1)
    a, b, c = conics[some.ids].unbind(-1)
    dx, dy = mx - x * m, my - y * m  # sums of v dx and of v dy
    parts = [
        -(a * dx + b * dy),
        -(b * dx + c * dy),
        (mxx - 2 * x * mx + x * x * m) / 2,
        mxy - x * my - y * mx + x * y * m,
        (myy - 2 * y * my + y * y * m) / 2,
        -m / opacities[some.ids],
    ]
    if probed:
        a, b, c = (each[..., None, None] for each in (a, b, c))
        slopes = a * found.dx + b * found.dy, b * found.dx + c * found.dy
        parts += [(v * slope.flatten(2)).abs().sum(-1) for slope in slopes]
    else:
        parts += [torch.zeros_like(m)] * 2
    return torch.stack(parts, dim=-1)


def sum_rows(rows: Float[Tensor, "p r"], bins: Bins) -> Float[Tensor, "m r"]:
    """Of each Gaussian: its rows lie beside each other, and are added in their order."""
    if not len(bins.order):
        return rows.new_zeros(0, rows.shape[1])
    sums = torch.segment_reduce(rows, "sum", lengths=bins.starts.diff().long(), initial=0)
    return torch.empty_like(sums).index_copy_(0, bins.order.long(), sums)


def whole(tiles: Float[Tensor, "tiles s f"], grid: Grid) -> Float[Tensor, "c h w f"]:
    """Images of their tiles."""
    image = rearrange(
        tiles, "(c rows columns) (y x) f -> c (rows y) (columns x) f",
        rows=grid.rows, columns=grid.columns, x=grid.tile,
    )  # fmt: skip
    return image[:, : grid.height, : grid.width].contiguous()


def tiled(image: Float[Tensor, "c h w f"], grid: Grid) -> Float[Tensor, "tiles s f"]:
    """Tiles of images, 0 beyond their edges."""
    below, right = grid.rows * grid.tile - grid.height, grid.columns * grid.tile - grid.width
    image = torch.nn.functional.pad(image, (0, 0, 0, right, 0, below))
    return rearrange(image, "c (rows y) (columns x) f -> (c rows columns) (y x) f",
                     y=grid.tile, x=grid.tile)  # fmt: skip
