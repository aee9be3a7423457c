"""The definition of `rasterize`, against which the fast paths are tested.

3D Gaussian Splatting for Real-Time Radiance Field Rendering (2023, arXiv:2308.04079). A Gaussian
with mean x, rotation R, scales s and opacity o is seen by a camera [W | t] with focal lengths f and
principal point c as one in the plane:

    q = W x + t                         Sigma = R diag(s)^2 R^T
    m = f q_xy / q_z + c                J = dm / dq, its slopes held within BEYOND of the image
    Sigma' = J W Sigma W^T J^T + BLUR 1

and covers of a pixel at p, those nearer first,

    alpha = min(ALPHA_CAP, o exp(-1/2 (p - m)^T Sigma'^-1 (p - m)))     nothing below ALPHA_LEAST
    color = sum_i T_i alpha_i c_i + T background      T_i = prod_j<i (1 - alpha_j), until STOP

Written to be checked by eye: one Gaussian after the other, no tiles, no code shared with the fast
paths but constants and spherical harmonics. float64 stays float64. Gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.splats import constants
from kernels.splats.project import colors_of


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    colors: Tensor | None = None,
    sh: Tensor | None = None,
    background: Tensor | None = None,
    near: float = constants.NEAR,
    far: float = constants.FAR,
    blur: float = constants.BLUR,
    antialiased: bool = False,
    trace: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """color [c, h, w, f], alpha and depth [c, h, w], as of `kernels.splats.op.rasterize`.

    Args:
        trace: is given what thresholds decide on: of every Gaussian that is seen, how much it
            covers of each pixel, and the light that it would leave, [2, h, w].
    """
    images = []
    for camera, (viewmat, K) in enumerate(zip(viewmats, Ks, strict=True)):
        if sh is not None:
            centre = -viewmat[:3, :3].T @ viewmat[:3, 3]
            seen = colors_of(sh, means - centre)
        else:
            assert colors is not None
            seen = colors[camera] if colors.ndim == 3 else colors
        images.append(
            _image(means, quats, scales, opacities, seen, viewmat, K, width, height,
                   background, near, far, blur, antialiased, trace)
        )  # fmt: skip
    color, alpha, depth = zip(*images, strict=True)
    return torch.stack(color), torch.stack(alpha), torch.stack(depth)


def _image(
    means, quats, scales, opacities, colors, viewmat, K, width, height, background, near, far, blur,
    antialiased, trace,
):  # fmt: skip
    W, t = viewmat[:3, :3], viewmat[:3, 3]
    f, c = torch.stack([K[0, 0], K[1, 1]]), torch.stack([K[0, 2], K[1, 2]])
    q = means @ W.T + t
    y, x = torch.meshgrid(
        torch.arange(height, dtype=means.dtype) + 0.5, torch.arange(width, dtype=means.dtype) + 0.5,
        indexing="ij",
    )  # fmt: skip
    p = torch.stack([x, y], dim=-1)
    left, full = torch.ones_like(x), torch.zeros_like(x, dtype=torch.bool)
    color, depth = x.new_zeros(height, width, colors.shape[-1]), torch.zeros_like(x)
    for i in torch.argsort(q[:, 2], stable=True).tolist():
        if not near < q[i, 2] < far:
            continue
        m = f * q[i, :2] / q[i, 2] + c
        cov = _covariance(q[i], quats[i], scales[i], W, f, c, width, height)
        wide = cov + blur * torch.eye(2, dtype=means.dtype)
        det = torch.linalg.det(wide).clamp_min(constants.DET_LEAST)
        opacity = opacities[i]
        if antialiased:
            ratio = torch.linalg.det(cov) / det
            opacity = opacity * ratio.clamp_min(constants.COMPENSATION_LEAST**2).sqrt()
        inverse = torch.stack([wide[1, 1], -wide[0, 1], -wide[1, 0], wide[0, 0]]).view(2, 2) / det
        sigma = 0.5 * torch.einsum("hwi,ij,hwj->hw", p - m, inverse, p - m)
        alpha = (opacity * torch.exp(-sigma)).clamp_max(constants.ALPHA_CAP)
        if trace is not None:
            trace.append(torch.stack([alpha, left * (1 - alpha)]).detach())
        there = alpha >= constants.ALPHA_LEAST
        full = full | (there & (left * (1 - alpha) <= constants.STOP))
        alpha = torch.where(there & ~full, alpha, 0.0)
        color = color + (left * alpha)[..., None] * colors[i]
        depth = depth + left * alpha * q[i, 2]
        left = left * (1 - alpha)
    if background is not None:
        color = color + left[..., None] * background
    alpha = 1 - left
    return color, alpha, torch.where(alpha > 0, depth / torch.where(alpha > 0, alpha, 1.0), 0.0)


def _covariance(q, quat, scale, W, f, c, width, height):
    """J W Sigma W^T J^T of one Gaussian."""
    w, x, y, z = quat / quat.norm()
    R = torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]).view(3, 3)  # fmt: skip
    sigma = R @ torch.diag(scale.square()) @ R.T
    rows = []
    for axis, size in enumerate((width, height)):
        beyond = constants.BEYOND * size / (2 * f[axis])
        low, high = -c[axis] / f[axis] - beyond, (size - c[axis]) / f[axis] + beyond
        slope = torch.minimum(torch.maximum(q[axis] / q[2], low), high)
        row = [torch.zeros_like(slope)] * 3
        row[axis], row[2] = f[axis] / q[2], -f[axis] * slope / q[2]
        rows.append(torch.stack(row))
    J = torch.stack(rows)
    return J @ W @ sigma @ W.T @ J.T
