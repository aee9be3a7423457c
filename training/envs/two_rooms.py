"""Two rooms with a door in the wall between them, and a dot that moves: exact, in batches.

The world of PLDM (Learning from Reward-Free Offline Data, 2025, arXiv:2502.14819) and of eb_jepa
(2026, arXiv:2602.03604), of which four variants with different rules are published; this is that of
eb_jepa. Positions are (x, y) in pixels of a canvas of 65 x 65, x to the right, y down:

    borders    lines at 4 and 60 that the dot must not touch
    wall       columns w - 1 .. w + 1 from top to bottom, but for a door
    door       rows d - 4 .. d + 4
    step       p' = p + a, if nothing is in the way; else one of two rules (`Contact`)
                 block   the dot stays where it is: the rule of the training data
                 bounce  it comes to lie near the point of contact, pushed off by noise: the rule
                         by which eb_jepa judges plans

What is seen are two channels: a Gaussian dot of width 1.3 pixels, and the walls. `pool` averages
the canvas over squares, for small machines.

What differs from eb_jepa: a dot that is no integer, channels that are normalised by constants of
the world and not by each image, a wall that is never in the dot's way to begin with.

Everything is a pure function of torch tensors, on whatever device they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

CANVAS = 65
LOW, HIGH = 4.0, 60.0  # the borders
HALF_WALL, HALF_DOOR = 1.0, 4.0
DOT_WIDTH = 1.3  # standard deviation
CLEAR = 2.6  # between a start or a goal and any wall
NEAR = 4.5  # a goal is reached within this distance
MAX_STEP = 2.45  # the declared bound of an action, on each axis
CONTACT_NOISE, CONTACT_CLEAR = 0.5, 0.3


class Contact(StrEnum):
    """What happens to a dot that runs into something."""

    block = "block"
    bounce = "bounce"


@dataclass(frozen=True)
class Rooms:
    """Where wall and door are, one for each of a batch; they broadcast against positions."""

    wall: Float[Tensor, " ..."]
    door: Float[Tensor, " ..."]

    def __getitem__(self, index: object) -> Rooms:
        return Rooms(self.wall[index], self.door[index])

    def to(self, device: torch.device) -> Rooms:
        return Rooms(self.wall.to(device), self.door.to(device))


def contact_time(
    position: Float[Tensor, "... 2"], action: Float[Tensor, "... 2"], rooms: Rooms
) -> tuple[Float[Tensor, " ..."], Bool[Tensor, " ..."]]:
    """The share of a step after which it meets something, and whether that is upright.

    Returns:
        1 or less where it meets something, infinity where nothing is in the way; whether what is
        met is a vertical line.
    """
    x, y = position.unbind(-1)
    dx, dy = action.unbind(-1)
    times, upright = [], []

    def meet(at: Tensor, along: Tensor, line: Tensor | float, solid: object = None) -> Tensor:
        """Share of the step at which a coordinate reaches a line, where the line is solid."""
        share = (line - at) / torch.where(along == 0, torch.inf, along)
        met = ((at - line) * (at + along - line) <= 0) & (along != 0)
        if solid is not None:
            met = met & solid(share)
        return torch.where(met, share, torch.inf)

    for line in (LOW, HIGH):
        times += [meet(x, dx, line), meet(y, dy, line)]
        upright += [True, False]
    for side in (-1.0, 1.0):
        times.append(
            meet(
                x,
                dx,
                rooms.wall + side * HALF_WALL,
                lambda share: (y + share * dy - rooms.door).abs() > HALF_DOOR,
            )
        )
        times.append(
            meet(
                y,
                dy,
                rooms.door + side * HALF_DOOR,
                lambda share: (x + share * dx - rooms.wall).abs() <= HALF_WALL,
            )
        )
        upright += [True, False]
    first, which = torch.stack(torch.broadcast_tensors(*times)).min(dim=0)
    return first, torch.tensor(upright, device=first.device)[which]


def move(
    position: Float[Tensor, "... 2"],
    action: Float[Tensor, "... 2"],
    rooms: Rooms,
    contact: Contact = Contact.block,
    noise: Float[Tensor, "... 2"] | None = None,
) -> Float[Tensor, "... 2"]:
    """Where a step leads.

    Args:
        noise: standard normal, along x and y; Contact.bounce needs it.
    """
    share, upright = contact_time(position, action, rooms)
    free = share.isinf()[..., None]
    if contact == Contact.block:
        return torch.where(free, position + action, position)
    if noise is None:
        raise ValueError("Contact.bounce needs noise")
    back = -action.sign() * noise.abs()  # along the normal of what was met: back where it came from
    normal = torch.stack([upright, ~upright], dim=-1)
    pushed = position + share.clamp(max=1.0)[..., None] * action
    pushed = pushed + CONTACT_NOISE * torch.where(normal, back, noise)
    pushed = pushed.clamp(LOW + CONTACT_CLEAR, HIGH - CONTACT_CLEAR)
    beyond = is_solid(pushed, rooms) | blocks(position, pushed, rooms)  # never through the wall
    pushed = torch.where(beyond[..., None], position, pushed)
    return torch.where(free, position + action, pushed)


def is_solid(position: Float[Tensor, "... 2"], rooms: Rooms) -> Bool[Tensor, " ..."]:
    """Whether a point lies in the wall."""
    x, y = position.unbind(-1)
    return ((x - rooms.wall).abs() <= HALF_WALL) & ((y - rooms.door).abs() > HALF_DOOR)


def side_of(position: Float[Tensor, "... 2"], rooms: Rooms) -> Float[Tensor, " ..."]:
    """-1 in the left room, 1 in the right one, 0 in the middle of the wall."""
    return (position[..., 0] - rooms.wall).sign()


def geodesic(
    a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"], rooms: Rooms
) -> Float[Tensor, " ..."]:
    """Length of the shortest path between points outside of the wall, around the door's corners."""
    straight = (b - a).norm(dim=-1)
    left, right = rooms.wall - HALF_WALL, rooms.wall + HALF_WALL
    swapped = a[..., :1] > b[..., :1]
    first, last = torch.where(swapped, b, a), torch.where(swapped, a, b)
    best = torch.full_like(straight, torch.inf)
    for entry in (-1.0, 1.0):  # by which corner the doorway is entered and left
        for exit in (-1.0, 1.0):
            corner = [
                torch.stack(torch.broadcast_tensors(x, rooms.door + side * HALF_DOOR), dim=-1)
                for x, side in ((left, entry), (right, exit))
            ]
            legs = (corner[0] - first, corner[1] - corner[0], last - corner[1])
            length = legs[0].norm(dim=-1) + legs[1].norm(dim=-1) + legs[2].norm(dim=-1)
            best = torch.minimum(best, length)
    for x in (left, right):  # or one corner only is touched
        for side in (-1.0, 1.0):
            corner = torch.stack(torch.broadcast_tensors(x, rooms.door + side * HALF_DOOR), dim=-1)
            clear = ~blocks(first, corner, rooms) & ~blocks(corner, last, rooms)
            length = (corner - first).norm(dim=-1) + (last - corner).norm(dim=-1)
            best = torch.where(clear, torch.minimum(best, length), best)
    return torch.where(blocks(first, last, rooms), best, straight)


def blocks(
    a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"], rooms: Rooms
) -> Bool[Tensor, " ..."]:
    """Whether the wall stands between two points; touching a corner of the door does not count."""
    along = b - a
    flat = along[..., 0] == 0
    run = torch.where(flat, 1.0, along[..., 0])
    hit = is_solid(a, rooms) & flat
    for side in (-1.0, 1.0):
        share = (rooms.wall + side * HALF_WALL - a[..., 0]) / run
        off = (a[..., 1] + share * along[..., 1] - rooms.door).abs() > HALF_DOOR + 1e-4
        hit = hit | ((share >= 0) & (share <= 1) & off & ~flat)
    return hit


def render(
    position: Float[Tensor, "b t 2"], rooms: Rooms, pool: int = 1
) -> Float[Tensor, "b t 2 s s"]:
    """What is seen: the dot and the walls, from 0 to 1, averaged over squares of `pool` pixels.

    Args:
        rooms: one for each b.
        pool: s = ceil(65 / pool); what lies beyond the canvas is empty.
    """
    count = image_size(pool)
    pixels = torch.arange(count * pool, device=position.device, dtype=position.dtype)
    profile = torch.exp(-((pixels - position[..., None]) ** 2) / (2 * DOT_WIDTH**2))
    profile = torch.where(pixels < CANVAS, profile, 0.0)
    profile = profile.unflatten(-1, (count, pool)).mean(-1)  # [b, t, 2, s]
    dot = profile[..., 1, :, None] * profile[..., 0, None, :]
    walls = render_walls(rooms, pool)[:, None].expand(-1, position.shape[1], -1, -1)
    return torch.stack([dot, walls], dim=2)


def render_walls(rooms: Rooms, pool: int = 1) -> Float[Tensor, "b s s"]:
    """The walls alone."""
    pixels = torch.arange(CANVAS, device=rooms.wall.device)
    line = (pixels == LOW) | (pixels == HIGH)
    wall = (pixels - rooms.wall[:, None]).abs() <= HALF_WALL  # [b, x]
    door = (pixels - rooms.door[:, None]).abs() <= HALF_DOOR  # [b, y]
    solid = line[:, None] | line[None, :] | (wall[:, None, :] & ~door[:, :, None])
    beyond = image_size(pool) * pool - CANVAS
    padded = F.pad(solid.to(rooms.wall.dtype), (0, beyond, 0, beyond))
    return F.avg_pool2d(padded, pool)


def image_size(pool: int) -> int:
    return math.ceil(CANVAS / pool)


def statistics(
    rooms: Rooms, pool: int = 1
) -> tuple[Float[Tensor, "2 1 1"], Float[Tensor, "2 1 1"]]:
    """Mean and standard deviation of each channel over the box and over all `rooms`.

    They are those of the canvas, and known without drawing: dots on a grid of a third of a pixel.
    """
    grid = torch.arange(LOW + 0.5, HIGH, 1 / 3, device=rooms.wall.device)
    here = torch.stack([grid, grid.flip(0)], dim=-1)[None]  # the dot's mass is the same anywhere
    images = render(here, rooms[:1], pool)[0, :, 0]
    walls = render_walls(rooms, pool)
    mean = torch.stack([images.mean(), walls.mean()])
    std = torch.stack([images.std(unbiased=False), walls.std(unbiased=False)])
    return mean[:, None, None], std[:, None, None]
