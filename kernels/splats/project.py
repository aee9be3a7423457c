"""Gaussians in space, as cameras see them: the plane's means, inverse covariances and extents.

Plain torch, differentiable in everything, cameras too; the equations are those of `reference.py`,
written out for symmetric matrices. With M = W R diag(s), the covariance in a camera is M M^T, and
the rows of J M are two vectors u, v:

    Sigma' = [[u.u, u.v], [u.v, v.v]] + BLUR 1      det Sigma' = |u x v|^2 + BLUR (u.u + v.v + BLUR)

whose determinant, so written, loses nothing where Gaussians are thin.

Dimensions: c cameras, n Gaussians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.splats import constants
from kernels.splats.harmonics import degree_of, harmonics

UNSEEN = -1.0


@dataclass(frozen=True)
class Projected:
    """Gaussians on the image planes of cameras."""

    centers: Float[Tensor, "c n 2"]
    "In pixels: the first one's centre is at 0.5."
    depths: Float[Tensor, "c n"]
    conics: Float[Tensor, "c n 3"]
    "Inverse covariances (a, b, c): 1/2 (a dx^2 + c dy^2) + b dx dy."
    opacities: Float[Tensor, "c n"]
    "Those given, of narrow Gaussians less if antialiased."
    extents: Float[Tensor, "c n 2"]
    "Whole pixels from the centre beyond which less than ALPHA_LEAST is covered; -1 where unseen."


def rotations(quats: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 3 3"]:
    """Of quaternions wxyz of any length but 0."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def project(
    means: Float[Tensor, "n 3"],
    quats: Float[Tensor, "n 4"],
    scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"],
    viewmats: Float[Tensor, "c 4 4"],
    Ks: Float[Tensor, "c 3 3"],
    width: int,
    height: int,
    *,
    near: float = constants.NEAR,
    far: float = constants.FAR,
    blur: float = constants.BLUR,
    antialiased: bool = False,
) -> Projected:
    """What each camera sees of each Gaussian. Arguments as of `op.rasterize`."""
    W, t = viewmats[:, :3, :3], viewmats[:, :3, 3]
    q = torch.einsum("cij,nj->cni", W, means) + t[:, None]
    depths = q[..., 2]
    seen = (depths > near) & (depths < far)
    z = torch.where(seen, depths, 1.0)  # nothing of what is not seen may become infinite
    fx, fy, cx, cy = (Ks[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    slopes = q[..., 0] / z, q[..., 1] / z
    centers = torch.stack([fx * slopes[0] + cx, fy * slopes[1] + cy], dim=-1)

    M = W[:, None] @ (rotations(quats) * scales[:, None])  # [c n 3 3]
    u = (fx / z)[..., None] * (
        M[..., 0, :] - held(slopes[0], fx, cx, width)[..., None] * M[..., 2, :]
    )
    v = (fy / z)[..., None] * (
        M[..., 1, :] - held(slopes[1], fy, cy, height)[..., None] * M[..., 2, :]
    )
    xx, xy, yy = ((a * b).sum(-1) for a, b in ((u, u), (u, v), (v, v)))
    area = torch.linalg.cross(u, v).square().sum(-1)
    det = (area + blur * (xx + yy + blur)).clamp_min(constants.DET_LEAST)
    conics = torch.stack([yy + blur, -xy, xx + blur], dim=-1) / det[..., None]

    opacities = opacities.expand_as(depths)
    if antialiased:
        opacities = opacities * (area / det).clamp_min(constants.COMPENSATION_LEAST**2).sqrt()
    with torch.no_grad():
        variances = torch.stack([xx, yy], dim=-1) + blur
        reach = 2 * (opacities / constants.ALPHA_LEAST).log()  # squared, in standard deviations
        extents = (reach.clamp_min(0)[..., None] * variances).sqrt().ceil()
        visible = seen & (opacities >= constants.ALPHA_LEAST)
        size = torch.tensor([width, height], device=means.device)
        visible &= ((centers + extents > 0) & (centers - extents < size)).all(-1)
        extents = torch.where(visible[..., None], extents, UNSEEN)
    return Projected(centers, depths, conics, opacities, extents)


def held(slope: Tensor, f: Tensor, c: Tensor, size: int) -> Tensor:
    """A direction x / z, held within what the image shows and somewhat beyond."""
    beyond = constants.BEYOND * size / (2 * f)
    return torch.minimum(torch.maximum(slope, -c / f - beyond), (size - c) / f + beyond)


def colors_of(
    sh: Float[Tensor, "n k 3"], directions: Float[Tensor, "*c n 3"]
) -> Float[Tensor, "*c n 3"]:
    """What is seen along each direction, of any length but 0."""
    x, y, z = F.normalize(directions, dim=-1).unbind(-1)
    basis = torch.stack(harmonics(x, y, z, degree_of(sh.shape[-2])), dim=-1)
    return (torch.einsum("...nk,nkd->...nd", basis, sh) + 0.5).clamp_min(0)
