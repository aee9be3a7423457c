"""`rasterize`: images of 3D Gaussians, differentiable in the Gaussians and in the cameras.

    seen = rasterize(means, quats, scales, opacities, viewmats, Ks, 64, 64, colors=colors)
    seen.color, seen.alpha, seen.depth

3D Gaussian Splatting for Real-Time Radiance Field Rendering (2023, arXiv:2308.04079). The
definition is in `reference.py`, numbers in `constants.py`. Three steps: `project.py` (where on the
image, and how wide), `bins.py` (which tile sees which, nearest first), and compositing:

    impl       what composites, with gradients that have the same bits every time
    triton     our kernels (`triton.py`), float32
    interpret  the same, interpreted on the CPU, for tests
    torch      plain torch, a few tiles at a time (`composite.py`)
    auto       triton on a GPU, else torch; `kernels.record` says which, and why

Conventions: cameras look along z, x to the right and y down (OpenCV, COLMAP); `viewmats` take the
world to the camera; the first pixel's centre is at (0.5, 0.5); quaternions are wxyz.

Dimensions: c cameras, n Gaussians, k coefficients of spherical harmonics, f features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import resolve
from kernels.splats import constants
from kernels.splats.bins import Grid, bin_gaussians
from kernels.splats.composite import Composite
from kernels.splats.harmonics import degree_of
from kernels.splats.project import Projected, colors_of, project

TILES = (8, 16)
MOST_FEATURES = 64
"That the kernels composite, the depth among them."


@dataclass(frozen=True)
class Render:
    """What cameras see."""

    color: Float[Tensor, "c h w f"]
    alpha: Float[Tensor, "c h w"]
    "How much of each pixel is covered."
    depth: Float[Tensor, "c h w"]
    "Mean z of what covers it, 0 where nothing does."
    projected: Projected
    "Where each camera sees each Gaussian."
    pairs: int
    "Of Gaussians and tiles."


def rasterize(
    means: Float[Tensor, "n 3"],
    quats: Float[Tensor, "n 4"],
    scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"],
    viewmats: Float[Tensor, "c 4 4"],
    Ks: Float[Tensor, "c 3 3"],
    width: int,
    height: int,
    *,
    colors: Float[Tensor, "n f"] | Float[Tensor, "c n f"] | None = None,
    sh: Float[Tensor, "n k 3"] | None = None,
    background: Float[Tensor, " f"] | Float[Tensor, "c f"] | None = None,
    probe: Float[Tensor, "c n 2"] | None = None,
    near: float = constants.NEAR,
    far: float = constants.FAR,
    blur: float = constants.BLUR,
    antialiased: bool = False,
    tile: int = constants.TILE,
    impl: str = "auto",
) -> Render:
    """Images of Gaussians from cameras.

    Args:
        means: in the world's units. scales: standard deviations along the Gaussian's axes, which
            `quats` turn; of any length but 0. opacities: from 0 to 1. float32 or float64.
        viewmats: world to camera. Ks: focal lengths and principal point, in pixels.
        colors: any number of features of each Gaussian, of one camera each or of all; or
        sh: coefficients of spherical harmonics, to degree 3, for red, green and blue.
        background: seen through what is not covered; black without it.
        probe: its gradient will be the sum over pixels of the sizes of those of centres (AbsGS).
        near, far: depths that are seen. blur: variance that a pixel adds, in square pixels.
        antialiased: what is narrower than a pixel covers less of it (Mip-Splatting).
        tile: pixels of a tile, each way: 8 or 16.
        impl: one of those above.
    Raises:
        ValueError: shapes, dtypes or devices that contradict each other, what is not finite, a
            quaternion of length 0, a negative scale, an opacity outside of 0 to 1, a focal length
            that is not above 0, or an `impl` that cannot run here.
    """
    _check_shapes(means, quats, scales, opacities, viewmats, Ks, colors, sh, background, probe)
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has none")
    if tile not in TILES:
        raise ValueError(f"tile={tile} is unknown: use {' or '.join(map(str, TILES))}")
    _check_values(means, quats, scales, opacities, viewmats, Ks, colors if sh is None else sh)
    grid = Grid(len(viewmats), width, height, tile)
    found = project(
        means, quats, scales, opacities, viewmats, Ks, width, height,
        near=near, far=far, blur=blur, antialiased=antialiased,
    )  # fmt: skip
    features = _features(means, viewmats, colors, sh)
    f, chosen = features.shape[-1], _chosen(means, features, impl)
    with torch.no_grad():
        bins = bin_gaussians(found.centers, found.extents, found.depths, grid)
    image, left = (Composite.apply if chosen == "torch" else _kernels())(
        found.centers.flatten(0, 1),
        found.conics.flatten(0, 1),
        found.opacities.flatten(),
        torch.cat([features, found.depths[..., None]], dim=-1).flatten(0, 1),
        None if probe is None else probe.flatten(0, 1),
        bins,
        grid,
    )
    color, alpha = image[..., :f], 1 - left
    if background is not None:
        color = color + left[..., None] * background.expand(len(viewmats), f)[:, None, None]
    covered = alpha > 0
    depth = torch.where(covered, image[..., f] / torch.where(covered, alpha, 1.0), 0.0)
    return Render(color, alpha, depth, found, len(bins.ids))


def _features(
    means: Tensor, viewmats: Tensor, colors: Tensor | None, sh: Tensor | None
) -> Float[Tensor, "c n f"]:
    """What each camera sees of each Gaussian."""
    if sh is not None:
        R, t = viewmats[:, :3, :3], viewmats[:, :3, 3]
        eyes = -torch.einsum("cji,cj->ci", R, t)
        return colors_of(sh, means - eyes[:, None])
    assert colors is not None
    return colors.expand(len(viewmats), *colors.shape[-2:])


def _chosen(means: Tensor, features: Tensor, impl: str) -> str:
    refusal = None
    if means.dtype != torch.float32:
        refusal = f"the kernels take float32, not {means.dtype}"
    elif features.shape[-1] + 1 > MOST_FEATURES:
        refusal = f"the kernels take up to {MOST_FEATURES - 1} features, not {features.shape[-1]}"
    return resolve("rasterize", impl, device=means.device, table="splat_forward", refusal=refusal)


def _kernels() -> Any:
    from kernels.splats.launch import composite

    return composite


def _check_shapes(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, viewmats: Tensor, Ks: Tensor,
    colors: Tensor | None, sh: Tensor | None, background: Tensor | None, probe: Tensor | None,
) -> None:  # fmt: skip
    n, c = len(means), len(viewmats)
    if (colors is None) == (sh is None):
        raise ValueError("rasterize: give either colors or sh")
    if sh is not None:
        f = 3
        degree_of(sh.shape[1] if sh.ndim == 3 else 0)
    else:
        assert colors is not None
        f = colors.shape[-1] if colors.ndim else 0
    wanted: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "means": (means, [(n, 3)]),
        "quats": (quats, [(n, 4)]),
        "scales": (scales, [(n, 3)]),
        "opacities": (opacities, [(n,)]),
        "viewmats": (viewmats, [(c, 4, 4)]),
        "Ks": (Ks, [(c, 3, 3)]),
        "colors": (colors, [(n, f), (c, n, f)]),
        "sh": (sh, [(n, sh.shape[1] if sh is not None else 0, 3)]),
        "background": (background, [(f,), (c, f)]),
        "probe": (probe, [(c, n, 2)]),
    }
    for name, (x, shapes) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"rasterize: {name} must be {allowed}, got {list(x.shape)}")
        if x.dtype != means.dtype or x.device != means.device:
            raise ValueError(
                f"rasterize: {name} is {x.dtype} on {x.device}, means {means.dtype} on "
                f"{means.device}: give all of them alike"
            )
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rasterize: means must be float32 or float64, not {means.dtype}")
    if not c:
        raise ValueError("rasterize: viewmats has no camera")


def _check_values(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, viewmats: Tensor, Ks: Tensor,
    seen: Tensor | None,
) -> None:  # fmt: skip
    """What would reach every pixel, or read where there is nothing; one wait for the device."""
    assert seen is not None
    given = {"means": means, "quats": quats, "scales": scales, "opacities": opacities,
             "viewmats": viewmats, "Ks": Ks, "colors": seen}  # fmt: skip
    finite = torch.stack([x.isfinite().all() for x in given.values()])
    rules = {
        "a quaternion of length 0": (quats.square().sum(-1) > 0).all(),
        "a scale below 0": (scales >= 0).all(),
        "an opacity outside of 0 to 1": ((opacities >= 0) & (opacities <= 1)).all(),
        "a focal length that is not above 0": ((Ks[:, 0, 0] > 0) & (Ks[:, 1, 1] > 0)).all(),
    }
    holds = torch.cat([finite, torch.stack(list(rules.values()))]).tolist()
    for name, fine in zip([*given, *rules], holds, strict=True):
        if not fine:
            what = (
                f"{name} has infinite or undefined values" if name in given else f"there is {name}"
            )
            raise ValueError(f"rasterize: {what}")
