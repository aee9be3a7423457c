"""Where pixels of cameras look: rays, points at depths, and where another camera sees these.

Matrices are applied by sums of products: of a matrix product autocast makes bf16, which is off by
pixels.

Dimensions: b cameras.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def directions(Ks: Float[Tensor, "*b 3 3"], height: int, width: int) -> Float[Tensor, "*b h w 3"]:
    """Through the middles of pixels, of depth 1, in the camera."""
    v, u = torch.meshgrid(
        torch.arange(height, device=Ks.device, dtype=Ks.dtype) + 0.5,
        torch.arange(width, device=Ks.device, dtype=Ks.dtype) + 0.5,
        indexing="ij",
    )
    x = (u - Ks[..., 0, 2, None, None]) / Ks[..., 0, 0, None, None]
    y = (v - Ks[..., 1, 2, None, None]) / Ks[..., 1, 1, None, None]
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def plucker(
    viewmats: Float[Tensor, "*b 4 4"], Ks: Float[Tensor, "*b 3 3"], height: int, width: int
) -> Float[Tensor, "*b h w 6"]:
    """Of each pixel the ray (d, o x d): its direction, of length 1, and its moment."""
    R, t = viewmats[..., :3, :3], viewmats[..., :3, 3]
    d = (R[..., None, None, :, :] * directions(Ks, height, width)[..., None]).sum(-2)
    d = F.normalize(d, dim=-1)
    o = -(R * t[..., None]).sum(-2)
    return torch.cat([d, torch.linalg.cross(o[..., None, None, :].expand_as(d), d)], dim=-1)


def points_at(
    depth: Float[Tensor, "*b h w"], viewmats: Float[Tensor, "*b 4 4"], Ks: Float[Tensor, "*b 3 3"]
) -> Float[Tensor, "*b h w 3"]:
    """In the world, what pixels see if it is so far away along z."""
    inside = directions(Ks, *depth.shape[-2:]) * depth[..., None]
    R, t = viewmats[..., :3, :3], viewmats[..., :3, 3]
    return (R[..., None, None, :, :] * (inside - t[..., None, None, :])[..., None]).sum(-2)


def sampled(
    image: Float[Tensor, "b c h w"],
    points: Float[Tensor, "b p q 3"],
    viewmats: Float[Tensor, "b 4 4"],
    Ks: Float[Tensor, "b 3 3"],
) -> tuple[Float[Tensor, "b c p q"], Float[Tensor, "b p q"]]:
    """What an image shows of points, between its pixels, and 1 where it shows them; else 0."""
    R, t = viewmats[:, :3, :3], viewmats[:, :3, 3]
    x, y, z = ((R[:, None, None] * points[..., None, :]).sum(-1) + t[:, None, None]).unbind(-1)
    ahead = z > 1e-3
    z = torch.where(ahead, z, 1.0)
    u = Ks[:, 0, 0, None, None] * x / z + Ks[:, 0, 2, None, None]
    v = Ks[:, 1, 1, None, None] * y / z + Ks[:, 1, 2, None, None]
    height, width = image.shape[-2:]
    grid = torch.stack([2 * u / width - 1, 2 * v / height - 1], dim=-1)
    there = ahead & (grid.abs() <= 1).all(-1)
    found = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    return found * there[:, None], there.to(image)
