"""Worlds that move by themselves: digits that bounce off the frame, balls off each other too.

Moving digits are those of Moving MNIST (Srivastava et al., 2015, arXiv:1502.04681): each goes
straight on and is reflected where it would leave the frame, in closed form. Balls are discs of one
mass (discs.py).

Everything is for many films at once. Units: pixels and frames; x to the right, y down; positions
are those of centres, the frame is [0, size]^2.

Dimensions: n films, t frames, k objects.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from training.envs.discs import Discs, Frame, draw, fly


def fold(x: Float64[np.ndarray, "*n"], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where something is that would be at x, had it not been reflected at low and high."""
    span = high - low
    phase = np.mod(x - low, 2 * span)
    return low + np.where(phase > span, 2 * span - phase, phase)


def drift(
    start: Float64[np.ndarray, "n k 2"],
    speed: Float64[np.ndarray, "n k 2"],
    radius: Float64[np.ndarray, "n k"],
    frames: int,
    size: float,
) -> Float64[np.ndarray, "n t k 2"]:
    """Objects that pass through each other and are reflected at the frame."""
    time = np.arange(frames)[:, None, None]
    margin = radius[:, None, :, None]
    return fold(start[:, None] + time * speed[:, None], margin, size - margin)


def collide(
    start: Float64[np.ndarray, "n k 2"],
    speed: Float64[np.ndarray, "n k 2"],
    radius: Float64[np.ndarray, "n k"],
    frames: int,
    size: float,
) -> tuple[Float64[np.ndarray, "n t k 2"], Float64[np.ndarray, "n t k 2"]]:
    """Positions and velocities of balls of one mass, none of which overlap at the start."""
    discs = Discs(*(torch.from_numpy(part) for part in (start, speed, radius)))
    box = Frame(size, size, alike=True)
    found = [discs]
    for _ in range(frames - 1):
        found.append(fly(found[-1], box).discs)
    positions, velocities = (torch.stack([each[i] for each in found], dim=1) for i in (0, 1))
    return positions.numpy(), velocities.numpy()


def draw_sprites(
    positions: Float[Tensor, "n t k 2"], sprites: Float[Tensor, "n k s s"], size: int
) -> Float[Tensor, "n t 1 size size"]:
    """Images of s x s pixels around the positions, bilinearly; the brighter of two wins."""
    n, t, k, _ = positions.shape
    side = sprites.shape[-1]
    scale = size / side
    theta = torch.zeros(n, t, k, 2, 3, device=positions.device)
    theta[..., 0, 0] = theta[..., 1, 1] = scale
    theta[..., 2] = -(positions / size * 2 - 1) * scale
    flat = sprites[:, None].expand(-1, t, -1, -1, -1).reshape(-1, 1, side, side)
    grid = F.affine_grid(theta.flatten(0, 2), [len(flat), 1, size, size], align_corners=False)
    drawn = F.grid_sample(flat, grid, align_corners=False)
    return drawn.view(n, t, k, size, size).amax(dim=2, keepdim=True)


def draw_discs(
    positions: Float[Tensor, "n t k 2"], radius: Float[Tensor, "n k"], size: int
) -> Float[Tensor, "n t 1 size size"]:
    """White discs whose edge is one pixel soft."""
    n, t, k, _ = positions.shape
    cover = draw(positions.flatten(0, 1), radius[:, None].expand(n, t, k).flatten(0, 1), size)
    return cover.amax(dim=1, keepdim=True).unflatten(0, (n, t))
