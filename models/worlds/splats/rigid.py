"""Rotations and rigid motions of Gaussians, by quaternions wxyz."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


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
