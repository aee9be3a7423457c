"""Compositing of projected Gaussians and its gradients in Triton.

    splat_forward     a program: the pixels of one tile; its Gaussians, BLOCK_G at a time, until no
                      pixel has any light left
    splat_backward    the same again, from front to back as well; nothing was stored on the way
    splat_sum         BLOCK_M Gaussians: their rows, one from each tile, added in their order

The equations are in `composite.py`. Gaussians lie along a tile's rows and pixels along its columns,
so that light is a cumulative product down the rows, what they show a product of matrices, w^T f,
and what they learn are sums along rows, of v, v x, v y, v x^2, v x y and v y^2, and of w g. Two
products of the light are carried from block to block: with the Gaussian that fills a pixel, which
says that it is full, and without it, which is the light that is left. Every pair of a tile and a
Gaussian has a row of its own to write, at its Gaussian's place: no atomics, the same bits every
time.

Dimensions: m Gaussians of all cameras, f features, p pairs of tiles and Gaussians.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_gaussians(
    centers, conics, opacities, ids, place, last, middle_x, middle_y,
):  # fmt: skip
    """Centres from the tile's middle, conics and opacities; opacity 0 where there is none."""
    there = place < last
    gaussian = tl.load(ids + place, mask=there, other=0).to(tl.int64)
    x = tl.load(centers + 2 * gaussian, mask=there, other=0.0) - middle_x
    y = tl.load(centers + 2 * gaussian + 1, mask=there, other=0.0) - middle_y
    a = tl.load(conics + 3 * gaussian, mask=there, other=0.0)
    b = tl.load(conics + 3 * gaussian + 1, mask=there, other=0.0)
    c = tl.load(conics + 3 * gaussian + 2, mask=there, other=0.0)
    opacity = tl.load(opacities + gaussian, mask=there, other=0.0)
    return gaussian, there, x, y, a, b, c, opacity


@triton.jit
def cover(dx, dy, a, b, c, opacity, CAP: tl.constexpr, LEAST: tl.constexpr):
    """o exp(-sigma), and alpha."""
    sigma = 0.5 * (a[:, None] * dx * dx + c[:, None] * dy * dy) + b[:, None] * dx * dy
    raw = opacity[:, None] * tl.exp(-tl.maximum(sigma, 0.0))
    alpha = tl.minimum(raw, CAP)
    return raw, tl.where(alpha >= LEAST, alpha, 0.0)


@triton.jit
def splat_forward(
    centers, conics, opacities, features, ids, offsets, image, left, columns, rows, width, height,
    FEATURES: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr,
    LEAST: tl.constexpr, STOP: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of all cameras. image [c, h, w, FEATURES], left [c, h, w]."""
    program = tl.program_id(0)
    tile, camera = program % (columns * rows), program // (columns * rows)
    pixel, slot, feature = tl.arange(0, TILE * TILE), tl.arange(0, BLOCK_G), tl.arange(0, PADDED)
    first_x, first_y = tile % columns * TILE, tile // columns * TILE
    column, row = first_x + pixel % TILE, first_y + pixel // TILE
    inside = (column < width) & (row < height)
    x = (pixel % TILE).to(tl.float32) + (0.5 - TILE / 2)
    y = (pixel // TILE).to(tl.float32) + (0.5 - TILE / 2)

    light, kept = tl.where(inside, 1.0, 0.0), tl.full([TILE * TILE], 1.0, tl.float32)
    total = tl.zeros([TILE * TILE, PADDED], tl.float32)
    start, last = tl.load(offsets + program), tl.load(offsets + program + 1)
    lightest = tl.max(light, 0)
    while (start < last) & (lightest > STOP):
        gaussian, there, mx, my, a, b, c, opacity = load_gaussians(
            centers, conics, opacities, ids, start + slot, last, first_x + TILE / 2,
            first_y + TILE / 2,
        )  # fmt: skip
        dx, dy = x[None, :] - mx[:, None], y[None, :] - my[:, None]
        _, alpha = cover(dx, dy, a, b, c, opacity, CAP, LEAST)
        after = tl.cumprod(1.0 - alpha, 0) * light[None, :]
        weight = tl.where(after > STOP, alpha * after / (1.0 - alpha), 0.0)
        f = tl.load(
            features + gaussian[:, None] * FEATURES + feature[None, :],
            mask=there[:, None] & (feature < FEATURES)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(tl.trans(weight), f, total, input_precision=PRECISION)
        kept = tl.minimum(kept, tl.min(tl.where(after > STOP, after, 1.0), 0))
        light = tl.min(after, 0)
        lightest = tl.max(light, 0)
        start += BLOCK_G

    place = (tl.cast(camera, tl.int64) * height + row) * width + column
    cells = place[:, None] * FEATURES + feature[None, :]
    tl.store(image + cells, total, mask=inside[:, None] & (feature < FEATURES)[None, :])
    tl.store(left + place, kept, mask=inside)


@triton.jit
def splat_backward(
    centers, conics, opacities, features, ids, offsets, slots, image, left, dimage, dleft, shares,
    columns, rows, width, height,
    FEATURES: tl.constexpr, TILE: tl.constexpr, SIZES: tl.constexpr,
    CAP: tl.constexpr, LEAST: tl.constexpr, STOP: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of all cameras. shares [p, 8 + FEATURES]: zeros, where pairs write theirs:
    centre, conic, opacity, the sizes of the centre's (with SIZES), features."""
    program = tl.program_id(0)
    tile, camera = program % (columns * rows), program // (columns * rows)
    pixel, slot = tl.arange(0, TILE * TILE), tl.arange(0, BLOCK_G)
    first_x, first_y = tile % columns * TILE, tile // columns * TILE
    column, row = first_x + pixel % TILE, first_y + pixel // TILE
    inside = (column < width) & (row < height)
    x = (pixel % TILE).to(tl.float32) + (0.5 - TILE / 2)
    y = (pixel // TILE).to(tl.float32) + (0.5 - TILE / 2)

    place = (tl.cast(camera, tl.int64) * height + row) * width + column
    rest = tl.load(left + place, mask=inside, other=0.0)
    rest *= tl.load(dleft + place, mask=inside, other=0.0)
    for f in range(FEATURES):
        seen = tl.load(image + place * FEATURES + f, mask=inside, other=0.0)
        rest += seen * tl.load(dimage + place * FEATURES + f, mask=inside, other=0.0)

    light = tl.where(inside, 1.0, 0.0)
    start, last = tl.load(offsets + program), tl.load(offsets + program + 1)
    lightest = tl.max(light, 0)
    while (start < last) & (lightest > STOP):
        gaussian, there, mx, my, a, b, c, opacity = load_gaussians(
            centers, conics, opacities, ids, start + slot, last, first_x + TILE / 2,
            first_y + TILE / 2,
        )  # fmt: skip
        dx, dy = x[None, :] - mx[:, None], y[None, :] - my[:, None]
        raw, alpha = cover(dx, dy, a, b, c, opacity, CAP, LEAST)
        after = tl.cumprod(1.0 - alpha, 0) * light[None, :]
        before = after / (1.0 - alpha)
        weight = tl.where(after > STOP, alpha * before, 0.0)
        value = tl.zeros([BLOCK_G, TILE * TILE], tl.float32)
        for f in range(FEATURES):
            own = tl.load(features + gaussian * FEATURES + f, mask=there, other=0.0)
            g = tl.load(dimage + place * FEATURES + f, mask=inside, other=0.0)
            value += own[:, None] * g[None, :]
        part = weight * value
        behind = rest[None, :] - tl.cumsum(part, 0)
        v = alpha * (behind / (1.0 - alpha) - before * value)
        v = tl.where((weight > 0.0) & (raw <= CAP), v, 0.0)
        rest -= tl.sum(part, 0)
        light = tl.min(after, 0)
        lightest = tl.max(light, 0)

        at = tl.load(slots + start + slot, mask=there, other=0).to(tl.int64)
        share = shares + at * (8 + FEATURES)
        for f in range(FEATURES):
            g = tl.load(dimage + place * FEATURES + f, mask=inside, other=0.0)
            tl.store(share + 8 + f, tl.sum(weight * g[None, :], 1), mask=there)
        m = tl.sum(v, 1)
        vx, vy = v * x[None, :], v * y[None, :]
        sx, sy = tl.sum(vx, 1), tl.sum(vy, 1)
        sxx, sxy = tl.sum(vx * x[None, :], 1), tl.sum(vx * y[None, :], 1)
        syy = tl.sum(vy * y[None, :], 1)
        tl.store(share, -(a * (sx - mx * m) + b * (sy - my * m)), mask=there)
        tl.store(share + 1, -(b * (sx - mx * m) + c * (sy - my * m)), mask=there)
        tl.store(share + 2, 0.5 * (sxx - 2 * mx * sx + mx * mx * m), mask=there)
        tl.store(share + 3, sxy - mx * sy - my * sx + mx * my * m, mask=there)
        tl.store(share + 4, 0.5 * (syy - 2 * my * sy + my * my * m), mask=there)
        tl.store(share + 5, -m / tl.where(there, opacity, 1.0), mask=there)
        if SIZES:
            slope_x = tl.abs(v * (a[:, None] * dx + b[:, None] * dy))
            slope_y = tl.abs(v * (b[:, None] * dx + c[:, None] * dy))
            tl.store(share + 6, tl.sum(slope_x, 1), mask=there)
            tl.store(share + 7, tl.sum(slope_y, 1), mask=there)
        start += BLOCK_G


@triton.jit
def splat_sum(
    shares, order, starts, sums, m, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of Gaussians in `order`. sums [m, COLUMNS]."""
    which, column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    there, filled = which < m, (column < COLUMNS)[None, :]
    first = tl.load(starts + which, mask=there, other=0)
    last = tl.load(starts + which + 1, mask=there, other=0)
    total = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for i in range(0, tl.max(last - first, 0)):
        row = (first + i).to(tl.int64)[:, None] * COLUMNS + column[None, :]
        total += tl.load(shares + row, mask=(first + i < last)[:, None] & filled, other=0.0)
    gaussian = tl.load(order + which, mask=there, other=0).to(tl.int64)
    cells = gaussian[:, None] * COLUMNS + column[None, :]
    tl.store(sums + cells, total, mask=there[:, None] & filled)
