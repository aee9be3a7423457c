"""Which patches are seen and which are to be told: blocks of images, tubes of clips.

    multi_block   I-JEPA (2023, arXiv:2301.08243): four target blocks of 15 to 20 % of the image, a
                  context block of 85 to 100 % from which the targets' patches are taken out; no
                  block reaches the last row or column, as published
    tubes         V-JEPA (2024, arXiv:2404.08471): blocks through all frames; what none of them
                  covers is the context, what any covers is to be told

The sizes of blocks are drawn once per batch, their places for every image. All masks of a batch get
the length of the shortest, by leaving out patches at random (published: the last ones, which are at
the bottom): the larger the batch, the smaller the context.

Dimensions: b images, m target blocks, k patches of the context, q of a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

TRIES = 100  # draws of places before a grid is said to be too small


class Masks(NamedTuple):
    """Numbers of patches, row by row (and frame by frame)."""

    context: Int64[np.ndarray, "b k"]
    targets: Int64[np.ndarray, "b m q"]


def block_size(
    rng: np.random.Generator,
    grid: Sequence[int],
    scale: Sequence[float],
    aspect: Sequence[float],
    spare: int = 0,
) -> tuple[int, int]:
    """Height and width of a block, in patches; one draw decides both ranges.

    Args:
        spare: rows and columns of the grid that it leaves, at least.
    """
    share = rng.random()
    area = (scale[0] + share * (scale[1] - scale[0])) * grid[0] * grid[1]
    ratio = aspect[0] + share * (aspect[1] - aspect[0])
    sides = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    height, width = (
        int(np.clip(side, 1, most - spare)) for side, most in zip(sides, grid, strict=True)
    )
    return height, width


def place(
    rng: np.random.Generator,
    grid: Sequence[int],
    size: tuple[int, int],
    count: tuple[int, ...],
    edge: bool = True,
) -> Bool[np.ndarray, "*count h w"]:
    """Blocks of one size; without `edge`, none reaches the last row or column."""
    inside = []
    for whole, part in zip(grid, size, strict=True):
        first = rng.integers(whole - part, size=count, endpoint=edge)[..., None]
        here = np.arange(whole)
        inside.append((here >= first) & (here < first + part))
    return inside[0][..., :, None] & inside[1][..., None, :]


def shortest(rng: np.random.Generator, masks: Bool[np.ndarray, "b n"]) -> Int64[np.ndarray, "b k"]:
    """Numbers of true entries, ascending, in every row as many as in the row with the fewest."""
    k = int(masks.sum(axis=1).min())
    order = np.where(masks, rng.random(masks.shape), 2.0)
    return np.sort(np.argsort(order, axis=1)[:, :k], axis=1)


def multi_block(
    rng: np.random.Generator,
    grid: Sequence[int],
    batch: int,
    *,
    targets: int = 4,
    target_scale: Sequence[float] = (0.15, 0.2),
    target_aspect: Sequence[float] = (0.75, 1.5),
    context_scale: Sequence[float] = (0.85, 1.0),
    min_keep: int = 10,
) -> Masks:
    """Masks of `batch` images of grid [rows, columns].

    Raises:
        ValueError: the targets leave fewer than `min_keep` patches, again and again.
    """
    size = block_size(rng, grid, target_scale, target_aspect, spare=1)
    around = block_size(rng, grid, context_scale, (1.0, 1.0), spare=1)
    blocks = np.empty((batch, targets, *grid), bool)
    context = np.empty((batch, *grid), bool)
    missing = np.arange(batch)
    for _ in range(TRIES):
        blocks[missing] = place(rng, grid, size, (len(missing), targets), edge=False)
        context[missing] = place(rng, grid, around, (len(missing),), edge=False)
        context[missing] &= ~blocks[missing].any(axis=1)
        missing = np.flatnonzero(context.sum(axis=(1, 2)) < min_keep)
        if not len(missing):
            break
    else:
        raise ValueError(
            no_context(grid, f"{targets} targets", size, min_keep, "recipe.target_scale")
        )
    told = shortest(rng, blocks.reshape(batch * targets, -1)).reshape(batch, targets, -1)
    return Masks(shortest(rng, context.reshape(batch, -1)), told)


def tubes(
    rng: np.random.Generator,
    grid: Sequence[int],
    batch: int,
    *,
    blocks: int = 8,
    scale: float = 0.15,
    aspect: Sequence[float] = (0.75, 1.5),
    min_keep: int = 1,
) -> Masks:
    """Masks of `batch` clips of grid [frames, rows, columns], one target each.

    Raises:
        ValueError: the blocks leave fewer than `min_keep` patches of a frame, again and again.
    """
    frames, *space = grid
    size = block_size(rng, space, (scale, scale), aspect)
    covered = np.empty((batch, *space), bool)
    missing = np.arange(batch)
    for _ in range(TRIES):
        covered[missing] = place(rng, space, size, (len(missing), blocks)).any(axis=1)
        missing = np.flatnonzero((~covered).sum(axis=(1, 2)) < min_keep)
        if not len(missing):
            break
    else:
        raise ValueError(no_context(space, f"{blocks} blocks", size, min_keep, "recipe.scales"))
    flat = covered.reshape(batch, -1)
    seen, told = (through(shortest(rng, part), frames, flat.shape[1]) for part in (~flat, flat))
    return Masks(seen, told[:, None])


def through(places: Int64[np.ndarray, "b k"], frames: int, area: int) -> Int64[np.ndarray, "b fk"]:
    """The same places in every frame."""
    found = places[:, None] + area * np.arange(frames)[:, None]  # [b, frames, k]
    return found.reshape(len(places), -1)


def no_context(
    grid: Sequence[int], what: str, size: tuple[int, int], min_keep: int, key: str
) -> str:
    return (
        f"{what} of {size[0]} x {size[1]} patches leave no {min_keep} of a grid of {grid[0]} x "
        f"{grid[1]} to be seen: use smaller patches (model.patch), or lower {key} or "
        "recipe.min_keep"
    )
