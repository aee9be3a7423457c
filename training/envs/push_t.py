"""Push-T: a disc pushes a T-shaped block over a table, with pymunk's contacts, and is drawn.

The task of Implicit Behavioral Cloning and Diffusion Policy (2023, arXiv:2303.04137), as DINO-WM
(2024, arXiv:2411.04983) and LeWorldModel (2026, arXiv:2603.19312) act in it: a canvas of 512 x 512,
y down, no gravity. A state is

    [agent x, y, block x, y, angle, agent vx, vy]        pixels, radians, pixels per second

and an action says where the disc should go, a = 1 for 100 pixels from where it is. For the ten
hundredths of a second of a step

    v += dt (100 (target - p) - 20 v),   p += v dt

    disc     radius 15, moved as told: nothing stops it, not even walls
    block    a bar of 120 x 30 and a stem of 30 x 90 below its middle, mass 1, moment 3000, no
             friction; its place is the middle of the bar's outer edge, it turns about (0, 45)
    table    what moves is at rest again after each hundredth of a second unless it is pushed
    walls    four, 5 pixels from the edges, that stop the block

It counts as soon as disc and block together are within 20 pixels of where they should be, and the
block's angle within pi / 9, ever.

What is seen has any size and is drawn in closed form. What differs: edges are one pixel soft, no
outlines, and the green T that the original task aims at is not drawn, as it has no part in this.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

if TYPE_CHECKING:
    import pymunk

CANVAS, WALL, WALL_RADIUS = 512.0, 5.0, 2.0
RADIUS, REACH = 15.0, 100.0  # of the disc; pixels of an action of 1
STIFFNESS, DRAG, DT, SUBSTEPS = 100.0, 20.0, 0.01, 10
MASS, MOMENT, CENTRE = 1.0, 3000.0, (0.0, 45.0)
BAR, STEM = (-60.0, 0.0, 60.0, 30.0), (-15.0, 30.0, 15.0, 120.0)  # left, top, right, bottom
NEAR, NEAR_ANGLE = 20.0, math.pi / 9
STATE = 7
PAPER, AGENT, BLOCK, LINES = (
    torch.tensor(rgb) / 255
    for rgb in ((255, 255, 255), (65, 105, 225), (143, 163, 184), (211, 211, 211))
)


class PushT:
    """Several tables at once, each a space of pymunk's.

    Args:
        states: [n, 7], what each begins with.
    """

    def __init__(self, states: Float32[np.ndarray, "n 7"]) -> None:
        self.tables = [Table(state) for state in np.asarray(states, np.float64)]

    @property
    def states(self) -> Float32[np.ndarray, "n 7"]:
        return np.array([table.state for table in self.tables], np.float32)

    def step(self, actions: Float32[np.ndarray, "n 2"]) -> Float32[np.ndarray, "n 7"]:
        """One action of each; where it led."""
        for table, action in zip(self.tables, np.asarray(actions, np.float64), strict=True):
            table.step(*action)
        return self.states


class Table:
    """One disc, one block, four walls."""

    def __init__(self, state: Float[np.ndarray, " 7"]) -> None:
        import pymunk

        self.space = pymunk.Space()
        self.space.damping = 0.0
        corners = [(WALL, WALL), (CANVAS - 6, WALL), (CANVAS - 6, CANVAS - 6), (WALL, CANVAS - 6)]
        for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
            self.space.add(pymunk.Segment(self.space.static_body, a, b, WALL_RADIUS))
        self.agent = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
        self.block = pymunk.Body(MASS, MOMENT)
        self.block.center_of_gravity = CENTRE
        shapes = [rectangle(self.block, sides) for sides in (BAR, STEM)]
        self.space.add(self.agent, pymunk.Circle(self.agent, RADIUS), self.block, *shapes)
        ax, ay, bx, by, angle, vx, vy = state
        self.agent.position, self.agent.velocity = (ax, ay), (vx, vy)
        self.block.angle = angle
        self.block.position = bx, by
        self.space.reindex_shapes_for_body(self.block)

    @property
    def state(self) -> list[float]:
        (ax, ay), (vx, vy) = self.agent.position, self.agent.velocity
        bx, by = self.block.position
        return [ax, ay, bx, by, self.block.angle % (2 * math.pi), vx, vy]

    def step(self, dx: float, dy: float) -> None:
        agent = self.agent
        tx, ty = agent.position.x + REACH * dx, agent.position.y + REACH * dy
        for _ in range(SUBSTEPS):
            (x, y), (vx, vy) = agent.position, agent.velocity
            agent.velocity = (
                vx + DT * (STIFFNESS * (tx - x) - DRAG * vx),
                vy + DT * (STIFFNESS * (ty - y) - DRAG * vy),
            )
            self.space.step(DT)


def rectangle(body: pymunk.Body, sides: tuple[float, float, float, float]) -> pymunk.Poly:
    import pymunk

    left, top, right, bottom = sides
    return pymunk.Poly(body, [(left, top), (right, top), (right, bottom), (left, bottom)])


def reached(states: Float[Tensor, "... 7"], goal: Float[Tensor, "... 7"]) -> Bool[Tensor, ...]:
    """Whether disc and block are where they should be."""
    turn = states[..., 4] - goal[..., 4]
    turn = torch.atan2(turn.sin(), turn.cos()).abs()
    return (distance(states, goal) < NEAR) & (turn < NEAR_ANGLE)


def distance(states: Float[Tensor, "... 7"], goal: Float[Tensor, "... 7"]) -> Float[Tensor, ...]:
    """Of disc and block together, in pixels; the angle has no part in it."""
    return (states - goal)[..., :4].norm(dim=-1)


def render(states: Float[Tensor, "... 7"], size: int) -> Float[Tensor, "... 3 s s"]:
    """Images in [0, 1]: a grey T on white, walls, a blue disc over all."""
    device, scale = states.device, size / CANVAS
    axis = (torch.arange(size, device=device) + 0.5) / scale
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    ax, ay, bx, by, angle = (states[..., i, None, None] for i in range(5))
    cos, sin = angle.cos(), angle.sin()
    along, down = (x - bx) * cos + (y - by) * sin, (y - by) * cos - (x - bx) * sin
    block = torch.minimum(outside(along, down, BAR), outside(along, down, STEM))
    disc = torch.hypot(x - ax, y - ay) - RADIUS
    edge = torch.minimum(torch.minimum(x, y), CANVAS - 1 - torch.maximum(x, y))
    wall = (edge - WALL).abs() - WALL_RADIUS
    image = PAPER.to(device)[:, None, None].expand(*states.shape[:-1], 3, size, size)
    for far, colour in ((block, BLOCK), (wall.expand_as(block), LINES), (disc, AGENT)):
        ink = (0.5 - far * scale).clamp(0, 1)[..., None, :, :]
        image = image + ink * (colour.to(device)[:, None, None] - image)
    return image


def outside(
    x: Float[Tensor, "... s s"], y: Float[Tensor, "... s s"], sides: tuple[float, ...]
) -> Float[Tensor, "... s s"]:
    """Distance from a rectangle, negative inside."""
    left, top, right, bottom = sides
    dx = torch.maximum(left - x, x - right)
    dy = torch.maximum(top - y, y - bottom)
    within = torch.maximum(dx, dy).clamp(max=0)
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + within
