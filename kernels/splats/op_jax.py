"""The jax twin of `op.py`: the same images, under jit, grad and vmap.

Shapes must not depend on values, so that the two numbers that do have room given beforehand:

    pairs      of Gaussians and tiles, of all cameras
    longest    Gaussians of one tile

`Render.pairs` and `Render.longest` say what was needed. If it is more than there was room for, what
lies furthest is missing: look at them, double the room, and compile again (`enough` does). float64
stays float64; gradients by autodiff, a tile's recomputed in the backward pass.

Dimensions: c cameras, n Gaussians, f features; s pixels of a tile, k = longest.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from kernels.splats import constants
from kernels.splats.harmonics import degree_of, harmonics

AT_ONCE = 8
"Tiles that are composited at a time."


class Render(NamedTuple):
    """What cameras see, and the room that it took."""

    color: Float[Array, "c h w f"]
    alpha: Float[Array, "c h w"]
    depth: Float[Array, "c h w"]
    pairs: Int[Array, ""]
    longest: Int[Array, ""]


def rasterize(
    means: Float[Array, "n 3"],
    quats: Float[Array, "n 4"],
    scales: Float[Array, "n 3"],
    opacities: Float[Array, " n"],
    viewmats: Float[Array, "c 4 4"],
    Ks: Float[Array, "c 3 3"],
    width: int,
    height: int,
    *,
    pairs: int,
    longest: int,
    colors: Float[Array, "n f"] | Float[Array, "c n f"] | None = None,
    sh: Float[Array, "n k 3"] | None = None,
    background: Float[Array, " f"] | Float[Array, "c f"] | None = None,
    near: float = constants.NEAR,
    far: float = constants.FAR,
    blur: float = constants.BLUR,
    antialiased: bool = False,
    tile: int = constants.TILE,
) -> Render:
    """As `op.rasterize`, with room for `pairs` and `longest`. Values are not checked.

    Raises:
        ValueError: neither or both of colors and sh, or no room.
    """
    if (colors is None) == (sh is None):
        raise ValueError("rasterize: give either colors or sh")
    if pairs < 1 or longest < 1:
        raise ValueError(f"rasterize: pairs={pairs} and longest={longest} must be 1 or more")
    c, rows, columns = len(viewmats), -(-height // tile), -(-width // tile)
    centers, depths, conics, opacities, extents = project(
        means, quats, scales, opacities, viewmats, Ks, width, height, near, far, blur, antialiased
    )
    if sh is not None:
        eyes = -jnp.einsum("cji,cj->ci", viewmats[:, :3, :3], viewmats[:, :3, 3])
        features = colors_of(sh, means - eyes[:, None])
    else:
        assert colors is not None
        features = jnp.broadcast_to(colors, (c, *colors.shape[-2:]))
    features = jnp.concatenate([features, depths[..., None]], axis=-1)

    ids, offsets, total = bin_gaussians(centers, extents, depths, rows, columns, tile, pairs)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (centers, conics, opacities, features)]

    @jax.checkpoint
    def of_tile(index: Int[Array, ""]) -> tuple[Float[Array, "s f"], Float[Array, " s"]]:
        place = offsets[index] + jnp.arange(longest)
        real = place < offsets[index + 1]
        own = [x[ids[jnp.where(real, place, 0)]] for x in flat]
        corner = jnp.stack([index % columns, index // columns % rows]) * tile
        return composite(corner, real, *own, tile)

    images, left = jax.lax.map(of_tile, jnp.arange(c * rows * columns), batch_size=AT_ONCE)
    image, left = (
        whole(images, c, rows, height, width, tile),
        whole(left[..., None], c, rows, height, width, tile)[..., 0],
    )
    color, alpha = image[..., :-1], 1 - left
    if background is not None:
        color = (
            color
            + left[..., None] * jnp.broadcast_to(background, (c, color.shape[-1]))[:, None, None]
        )
    covered = alpha > 0
    depth = jnp.where(covered, image[..., -1] / jnp.where(covered, alpha, 1.0), 0.0)
    return Render(color, alpha, depth, total, jnp.diff(offsets).max())


def enough(render: Render, pairs: int, longest: int) -> tuple[int, int]:
    """The room that was given, doubled until what was needed fits. Waits for the device."""
    while pairs < int(render.pairs):
        pairs *= 2
    while longest < int(render.longest):
        longest *= 2
    return pairs, longest


def project(
    means: Array, quats: Array, scales: Array, opacities: Array, viewmats: Array, Ks: Array,
    width: int, height: int, near: float, far: float, blur: float, antialiased: bool,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """Centres, depths, conics, opacities and extents [c n ...], as of `project.project`."""
    W, t = viewmats[:, :3, :3], viewmats[:, :3, 3]
    q = jnp.einsum("cij,nj->cni", W, means, precision="highest") + t[:, None]
    depths = q[..., 2]
    seen = (depths > near) & (depths < far)
    z = jnp.where(seen, depths, 1.0)
    fx, fy, cx, cy = (Ks[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    slope_x, slope_y = q[..., 0] / z, q[..., 1] / z
    centers = jnp.stack([fx * slope_x + cx, fy * slope_y + cy], axis=-1)

    turned = rotations(quats) * scales[:, None]
    M = jnp.einsum("cij,njk->cnik", W, turned, precision="highest")
    held_x, held_y = held(slope_x, fx, cx, width), held(slope_y, fy, cy, height)
    u = (fx / z)[..., None] * (M[..., 0, :] - held_x[..., None] * M[..., 2, :])
    v = (fy / z)[..., None] * (M[..., 1, :] - held_y[..., None] * M[..., 2, :])
    xx, xy, yy = ((a * b).sum(-1) for a, b in ((u, u), (u, v), (v, v)))
    area = jnp.square(jnp.cross(u, v)).sum(-1)
    det = jnp.maximum(area + blur * (xx + yy + blur), constants.DET_LEAST)
    conics = jnp.stack([yy + blur, -xy, xx + blur], axis=-1) / det[..., None]

    opacities = jnp.broadcast_to(opacities, depths.shape)
    if antialiased:
        ratio = jnp.maximum(area / det, constants.COMPENSATION_LEAST**2)
        opacities = opacities * jnp.sqrt(ratio)
    reach = 2 * jnp.log(jnp.maximum(opacities / constants.ALPHA_LEAST, 1.0))
    extents = jnp.ceil(jnp.sqrt(reach[..., None] * (jnp.stack([xx, yy], axis=-1) + blur)))
    visible = seen & (opacities >= constants.ALPHA_LEAST)
    size = jnp.array([width, height])
    visible &= ((centers + extents > 0) & (centers - extents < size)).all(-1)
    extents = jnp.where(visible[..., None], extents, -1.0)
    return centers, depths, conics, opacities, jax.lax.stop_gradient(extents)


def rotations(quats: Float[Array, "n 4"]) -> Float[Array, "n 3 3"]:
    """Of quaternions wxyz of any length but 0."""
    w, x, y, z = jnp.moveaxis(quats / jnp.linalg.norm(quats, axis=-1, keepdims=True), -1, 0)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return jnp.stack(rows, axis=-1).reshape(-1, 3, 3)


def held(slope: Array, f: Array, c: Array, size: int) -> Array:
    """A direction x / z, held within what the image shows and somewhat beyond."""
    beyond = constants.BEYOND * size / (2 * f)
    return jnp.minimum(jnp.maximum(slope, -c / f - beyond), (size - c) / f + beyond)


def colors_of(
    sh: Float[Array, "n k 3"], directions: Float[Array, "c n 3"]
) -> Float[Array, "c n 3"]:
    """What is seen along each direction, of any length but 0."""
    unit = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    basis = jnp.stack(harmonics(*jnp.moveaxis(unit, -1, 0), degree_of(sh.shape[-2])), axis=-1)
    return jnp.maximum(jnp.einsum("cnk,nkd->cnd", basis, sh, precision="highest") + 0.5, 0)


def bin_gaussians(
    centers: Array, extents: Array, depths: Array, rows: int, columns: int, tile: int, pairs: int
) -> tuple[Array, Array, Array]:
    """Gaussians of each pair, tile after tile and nearest first; where each tile's begin; and how
    many pairs there are, or would be."""
    c, n = depths.shape
    last = jnp.array([columns, rows])
    low = jnp.clip(jnp.floor((centers - extents) / tile), 0, last).astype(int)
    high = jnp.clip(jnp.ceil((centers + extents) / tile), 0, last).astype(int)
    span = jnp.where((extents < 0).any(-1, keepdims=True), 0, high - low).reshape(c * n, 2)
    first = (jnp.arange(c)[:, None] * rows + low[..., 1]) * columns + low[..., 0]

    order = jnp.argsort(depths.ravel(), stable=True)
    ends = jnp.cumsum(span.prod(-1)[order])
    place = jnp.arange(pairs)
    owner = jnp.searchsorted(ends, place, side="right")
    real, owner = owner < c * n, jnp.minimum(owner, c * n - 1)
    ids = order[owner]
    within = place - jnp.where(owner > 0, ends[owner - 1], 0)
    width = jnp.maximum(span[ids, 0], 1)
    tiles = first.ravel()[ids] + within // width * columns + within % width
    tiles = jnp.where(real, tiles, c * rows * columns)
    tiles, ids = jax.lax.sort((tiles, ids), num_keys=1, is_stable=True)
    return ids, jnp.searchsorted(tiles, jnp.arange(c * rows * columns + 1)), ends[-1]


def composite(
    corner: Int[Array, 2],
    real: Array,
    centers: Float[Array, "k 2"],
    conics: Float[Array, "k 3"],
    opacities: Float[Array, " k"],
    features: Float[Array, "k f"],
    tile: int,
) -> tuple[Float[Array, "s f"], Float[Array, " s"]]:
    """One tile: what its pixels show, and the light that is left; equations in `composite.py`."""
    y, x = jnp.mgrid[:tile, :tile] + 0.5
    dx = (corner[0] + x.ravel()) - centers[:, 0, None]  # [k s]
    dy = (corner[1] + y.ravel()) - centers[:, 1, None]
    a, b, c = conics.T[..., None]
    sigma = jnp.maximum(0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy, 0)
    alpha = jnp.minimum(
        jnp.where(real, opacities, 0)[:, None] * jnp.exp(-sigma), constants.ALPHA_CAP
    )
    alpha = jnp.where(alpha >= constants.ALPHA_LEAST, alpha, 0)
    light = jnp.cumprod(1 - alpha, axis=0)
    there = light > constants.STOP
    weights = jnp.where(there, alpha * light / (1 - alpha), 0)
    image = jnp.matmul(weights.T, features, precision="highest")
    return image, jnp.where(there, light, 1).min(0, initial=1.0)


def whole(tiles: Array, cameras: int, rows: int, height: int, width: int, tile: int) -> Array:
    """Images of their tiles."""
    image = rearrange(
        tiles, "(c rows columns) (y x) f -> c (rows y) (columns x) f", c=cameras, rows=rows, x=tile
    )
    return image[:, :height, :width]
