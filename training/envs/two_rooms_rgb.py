"""Two rooms in colour: the world that LeWorldModel was judged in, exact, in batches.

TwoRoom-v1 of stable-worldmodel (2026, arXiv:2602.08968), one of four worlds of that name whose
numbers cannot be compared (experiments/jepa_planning/README.md says which). Positions are (x, y) in
pixels of a canvas of 224 x 224, x to the right, y down:

    borders    lines 4 pixels wide around [14, 210]^2
    wall       10 pixels wide at x = 112, but for a door of half height 14 around y = 49
    dot        red, a Gaussian of width 7, which is its radius too
    step       p' = p + 5 clip(a, -1, 1), then clamped to where the dot has room (half a pixel more
               than its radius); in the doorway it keeps 1.75 pixels from the jambs besides

Goals are 25 steps ahead in a walk, and reached as soon as the dot is within 16 pixels, ever. By
that rule random actions reach about a quarter of them (le-wm#101).

What is seen has any size: the canvas is drawn in closed form at that size. What differs from the
original: walls are drawn with edges one pixel soft.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

CANVAS = 224.0
LOW, HIGH, LINE = 14.0, 210.0, 4.0
WALL, HALF_WALL = 112.0, 5.0
DOOR, HALF_DOOR, DOOR_MARGIN = 49.0, 14.0, 1.75
RADIUS, ROOM = 7.0, 7.5
SPEED = 5.0  # pixels of a step whose action is 1
NEAR = 16.0
LEAST, MOST = LOW + ROOM, HIGH - ROOM  # of either coordinate
LEFT, RIGHT = WALL - HALF_WALL - ROOM, WALL + HALF_WALL + ROOM  # where the wall stops the dot
PASS = HALF_DOOR - DOOR_MARGIN  # how far from the door's middle it gets through


def move(
    position: Float[Tensor, "... 2"], action: Float[Tensor, "... 2"]
) -> Float[Tensor, "... 2"]:
    """Where a step leads."""
    x, y = position.unbind(-1)
    dx, dy = (SPEED * action.clamp(-1, 1)).unbind(-1)
    inside = (x > LEFT) & (x < RIGHT)  # in the doorway already
    free_y = (y + dy).clamp(LEAST, MOST)
    new_y = torch.where(inside, free_y.clamp(DOOR - PASS, DOOR + PASS), free_y)
    new_x = (x + dx).clamp(LEAST, MOST)
    closed = (new_y - DOOR).abs() > PASS
    new_x = torch.where(closed & (x <= LEFT), new_x.clamp(max=LEFT), new_x)
    new_x = torch.where(closed & (x >= RIGHT), new_x.clamp(min=RIGHT), new_x)
    return torch.stack([new_x, new_y], dim=-1)


def towards(
    position: Float[Tensor, "... 2"], goal: Float[Tensor, "... 2"]
) -> Float[Tensor, "... 2"]:
    """The action of one who knows the way: to the door if the goal is in the other room."""
    door = torch.tensor([WALL, DOOR], device=position.device).expand_as(position)
    other = (position[..., 0] - WALL) * (goal[..., 0] - WALL) < 0
    # Level with the door first, so that the wall's corner is not in the way.
    level = (position[..., 1] - DOOR).abs() < PASS - 1
    side = torch.where(position[..., 0] < WALL, LEFT - 1, RIGHT + 1)
    before = torch.stack([side, torch.full_like(side, DOOR)], dim=-1)
    passing = (position[..., 0] > LEFT) & (position[..., 0] < RIGHT)
    beyond = torch.stack([2 * WALL - side, torch.full_like(side, DOOR)], dim=-1)
    passage = torch.where(passing[..., None], beyond, door)
    by_door = torch.where((level | passing)[..., None], passage, before)
    way = torch.where(other[..., None], by_door, goal)
    return ((way - position) / SPEED).clamp(-1, 1)


def render(positions: Float[Tensor, "... 2"], size: int) -> Float[Tensor, "... 3 s s"]:
    """Images in [0, 1]: white, black walls, a red dot."""
    scale = size / CANVAS
    axis = (torch.arange(size, device=positions.device) + 0.5) / scale  # canvas coordinates
    paper = 1 - walls(axis, scale)  # [y, x]
    x, y = positions[..., 0, None], positions[..., 1, None]
    across, down = (
        torch.exp(-(axis - at).square() / (2 * RADIUS**2)) for at in (x, y)
    )  # [..., size]
    ink = down[..., :, None] * across[..., None, :]
    red = paper * (1 - ink) + ink
    rest = paper * (1 - ink)
    return torch.stack([red, rest, rest], dim=-3)


def walls(axis: Float[Tensor, " s"], scale: float) -> Float[Tensor, "s s"]:
    """How much of each pixel [y, x] is wall."""

    def between(low: float, high: float) -> Tensor:
        """Share of each pixel between two coordinates."""
        half = 0.5 / scale
        covered = torch.minimum(axis + half, torch.tensor(high)) - torch.maximum(
            axis - half, torch.tensor(low)
        )
        return (covered * scale).clamp(0, 1)

    inner = between(LOW, HIGH)
    outer = between(LOW - LINE, HIGH + LINE)
    frame = outer[:, None] * outer - inner[:, None] * inner
    closed = inner - between(DOOR - HALF_DOOR, DOOR + HALF_DOOR)
    return (frame + closed[:, None] * between(WALL - HALF_WALL, WALL + HALF_WALL)).clamp(0, 1)
