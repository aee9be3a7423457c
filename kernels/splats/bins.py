"""Which Gaussians each tile of an image composites, nearest first.

    order     Gaussians of all cameras by depth, equal ones by index (a stable sort)
    pairs     for each of them in turn, every tile within its extent
    tiles     one stable sort of the pairs by tile: order of depth stays

A pair has two places: among its tile's, where it is read, and among its Gaussian's, `slots`, where
its share of the gradient is written, so that nobody adds to what others add to. int32 throughout;
one wait for the device, for the number of pairs.

Dimensions: c cameras, n Gaussians, m = c n of them all, p pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_PAIRS = 2**31 - 1


@dataclass(frozen=True)
class Grid:
    """Tiles of the images of all cameras."""

    cameras: int
    width: int
    height: int
    tile: int

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile)

    @property
    def tiles(self) -> int:
        return self.cameras * self.rows * self.columns


@dataclass(frozen=True)
class Bins:
    """Pairs of tiles and Gaussians."""

    ids: Int[Tensor, " p"]
    "Gaussian of each pair, tile after tile, nearest first."
    offsets: Int[Tensor, " tiles+1"]
    "Where the pairs of each tile begin, and where the last one's end."
    slots: Int[Tensor, " p"]
    "Place of each pair among those of Gaussians in `order`."
    order: Int[Tensor, " m"]
    starts: Int[Tensor, " m+1"]
    "Where in that list the pairs of each Gaussian of `order` begin."


def bin_gaussians(
    centers: Float[Tensor, "c n 2"],
    extents: Float[Tensor, "c n 2"],
    depths: Float[Tensor, "c n"],
    grid: Grid,
) -> Bins:
    """Pairs for which the extents meet the tile.

    Raises:
        ValueError: more than 2^31 - 1 pairs.
    """
    device, c = centers.device, len(depths)
    last = torch.tensor([grid.columns, grid.rows], device=device)
    low = ((centers - extents) / grid.tile).floor().clamp_min(0).minimum(last).int()
    high = ((centers + extents) / grid.tile).ceil().clamp_min(0).minimum(last).int()
    span = torch.where((extents < 0).any(-1, keepdim=True), 0, high - low).clamp_min(0)
    camera = torch.arange(c, device=device, dtype=torch.int32)[:, None]
    first = (camera * grid.rows + low[..., 1]) * grid.columns + low[..., 0]

    order = torch.argsort(depths.flatten(), stable=True)
    counts = span.prod(-1).flatten()[order]
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if total > MOST_PAIRS:
        raise ValueError(
            f"{total} pairs of Gaussians and tiles, at most {MOST_PAIRS} can be drawn: give fewer "
            "cameras at a time, or a larger tile"
        )
    starts = torch.nn.functional.pad(ends, (1, 0))
    owner = torch.repeat_interleave(counts, output_size=total)  # a place in order
    within = torch.arange(total, device=device) - starts[owner]
    ids = order[owner]
    width = span[..., 0].flatten()[ids].clamp_min(1)
    tiles = first.flatten()[ids] + within // width * grid.columns + within % width
    tiles, slots = torch.sort(tiles.int(), stable=True)
    edges = torch.arange(grid.tiles + 1, device=device, dtype=torch.int32)
    offsets = torch.searchsorted(tiles, edges, out_int32=True)
    return Bins(ids[slots].int(), offsets, slots.int(), order.int(), starts.int())
