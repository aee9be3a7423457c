"""Worlds that move by themselves: digits that bounce off the frame, balls off each other too.

Moving digits are those of Moving MNIST (Srivastava et al., 2015, arXiv:1502.04681): each goes
straight on and is reflected where it would leave the frame, in closed form. Balls are discs of one
mass that collide elastically with each other and the frame, from event to event, so that energy is
kept to rounding and, between bounces off the frame, momentum too.

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

EVENTS = 10_000  # after so many in one frame something is wrong


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
    x, v = start.copy(), speed.copy()
    found = [(x.copy(), v.copy())]
    for _ in range(frames - 1):
        left = np.ones(len(x))  # of the frame, for each film
        for _ in range(EVENTS):
            wait, kind, first, second = next_event(x, v, radius, size)
            step = np.minimum(wait, left)
            x += step[:, None, None] * v
            left = left - step
            hit = np.flatnonzero(wait <= step)
            if not len(hit):
                break
            bounce(x, v, hit, kind[hit], first[hit], second[hit])
        else:
            raise RuntimeError(f"balls met more than {EVENTS} times in one frame")
        found.append((x.copy(), v.copy()))
    positions, velocities = (np.stack(part, axis=1) for part in zip(*found, strict=True))
    return positions, velocities


def next_event(
    x: Float64[np.ndarray, "n k 2"],
    v: Float64[np.ndarray, "n k 2"],
    radius: Float64[np.ndarray, "n k"],
    size: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each film: time to the next bounce; its axis, or 2 for two balls; which ones."""
    n, k, _ = x.shape
    edge = radius[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.where(v > 0, size - edge - x, edge - x)
        walls = np.where(v != 0, room / v, np.inf).clip(0)  # [n, k, 2]
        apart, closing = x[:, :, None] - x[:, None], v[:, :, None] - v[:, None]  # [n, k, k, 2]
        b = (apart * closing).sum(-1)
        a = (closing**2).sum(-1)
        c = (apart**2).sum(-1) - (radius[:, :, None] + radius[:, None]) ** 2
        root = b**2 - a * c
        meet = np.where((b < 0) & (root > 0), (-b - np.sqrt(root.clip(0))) / a, np.inf).clip(0)
    pairs = np.triu(np.ones((k, k), bool), 1)
    times = np.concatenate(
        [walls[..., 0], walls[..., 1], np.where(pairs, meet, np.inf).reshape(n, -1)], axis=1
    )
    index = times.argmin(axis=1)
    kind = np.minimum(index // k, 2)
    pair = np.maximum(index - 2 * k, 0)
    first = np.where(kind < 2, index % k, pair // k)
    second = np.where(kind < 2, index % k, pair % k)
    return times[np.arange(n), index], kind, first, second


def bounce(x, v, rows, kind, first, second) -> None:
    """Change velocities: one component at the frame, those along the line of centres between
    balls."""
    wall = kind < 2
    v[rows[wall], first[wall], kind[wall]] *= -1
    rows, first, second = rows[~wall], first[~wall], second[~wall]
    normal = x[rows, first] - x[rows, second]
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    along = ((v[rows, first] - v[rows, second]) * normal).sum(-1, keepdims=True) * normal
    v[rows, first] -= along
    v[rows, second] += along


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
    axis = torch.arange(size, device=positions.device) + 0.5
    dx, dy = (axis - positions[..., i, None] for i in (0, 1))  # [n, t, k, size]
    distance = (dy[..., :, None].square() + dx[..., None, :].square()).sqrt()
    inside = (radius[:, None, :, None, None] - distance + 0.5).clamp(0, 1)
    return inside.amax(dim=2, keepdim=True)
