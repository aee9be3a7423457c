"""Rotations and rigid motions of Gaussians, by quaternions wxyz."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.splats.harmonics import degree_of, harmonics
from kernels.splats.project import rotations
from models.worlds.splats.gaussians import Fields

DIRECTIONS = F.normalize(torch.randn(32, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
"By which harmonics are turned."


def product(p: Float[Tensor, "*n 4"], q: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Turned by q, then by p."""
    a, b, c, d = p.unbind(-1)
    e, f, g, h = q.unbind(-1)
    parts = [
        a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e,
    ]  # fmt: skip
    return torch.stack(parts, dim=-1)


def inverse(q: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Of quaternions of length 1."""
    return q * q.new_tensor([1.0, -1.0, -1.0, -1.0])


def towards(q: Float[Tensor, "*n 4"], p: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """q or -q, which is the same rotation: the one that is nearer to p."""
    return torch.where((p * q).sum(-1, keepdim=True) < 0, -q, q)


def moved(scene: Fields, pose: Float[Tensor, " 7"]) -> Fields:
    """Gaussians as a rigid body: what `rasterize` takes, elsewhere and turned.

    Args:
        pose: position and quaternion wxyz of the frame that they are told in.
    """
    place, q = pose[:3], F.normalize(pose[3:], dim=-1)
    R = rotations(q)
    return scene | {
        "means": scene["means"] @ R.T + place,
        "quats": product(q.expand_as(scene["quats"]), scene["quats"]),
        "sh": turned_harmonics(scene["sh"], R),
    }


def inverse_pose(pose: Float[Tensor, "*n 7"]) -> Float[Tensor, "*n 7"]:
    """What undoes it."""
    q = inverse(F.normalize(pose[..., 3:], dim=-1))
    place = -torch.einsum("...ij,...j->...i", rotations(q), pose[..., :3])
    return torch.cat([place, q], dim=-1)


def turned_harmonics(sh: Float[Tensor, "n k 3"], R: Float[Tensor, "3 3"]) -> Float[Tensor, "n k 3"]:
    """Coefficients of colours that are turned with what they are on: c'(d) = c(R^T d).

    Of each degree, the matrix that does so for more directions than there are harmonics; gradients
    reach R.
    """
    if sh.shape[1] == 1:
        return sh
    degree, d = degree_of(sh.shape[1]), DIRECTIONS.to(R)
    fixed, turned = (
        torch.stack(harmonics(x[:, 0], x[:, 1], x[:, 2], degree), dim=-1) for x in (d, d @ R)
    )  # [s k]
    parts = [sh[:, :1]]
    for n in range(1, degree + 1):
        own = slice(n * n, (n + 1) ** 2)
        solved = torch.linalg.pinv(fixed[:, own].double()).to(R) @ turned[:, own]
        parts.append(torch.einsum("kj,njc->nkc", solved, sh[:, own]))
    return torch.cat(parts, dim=1)
