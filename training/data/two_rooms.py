"""Walks through two rooms: where a dot was, what it did, in which rooms. Nothing is drawn here.

The data of eb_jepa (2026, arXiv:2602.03604) and PLDM (2025, arXiv:2502.14819), made all at once
instead of state by state. A walk of `data.walk` states begins anywhere, and then

    heading   += VonMises(0, kappa 5)
    a         = length (cos heading, sin heading),   length ~ Normal(1, 0.4) within [0.2, 1.8]
    p         <- p + a, or stays where something is in the way

A share of the walks leads through the door: from a point in the doorway one walk goes right and
one goes left; the second, told backwards, is followed by the first. Half of the crossing walks are
then told backwards whole. A step told backwards is -a; one that was blocked stays as it is, since
it is blocked both ways.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32

from training.data.config_worlds import TwoRoomsConfig, Wall
from training.data.generated import GeneratedData
from training.data.order import permute
from training.envs.two_rooms import HALF_DOOR, HALF_WALL, HIGH, LOW, Rooms, is_solid, move
from training.seeding import numpy_rng, stream_seed

KAPPA = 5.0
LENGTH, LENGTH_SPREAD, SHORTEST, LONGEST = 1.0, 0.4, 0.2, 1.8
DOORWAY_SPREAD = 1.4  # of where a crossing walk passes the door, in rows
FIXED = 32.0, 18.0  # wall and door
WALLS, DOORS = (20, 44), (10, 54)  # where they are otherwise, both ends included


class Walks(NamedTuple):
    """Where the dot was and what it did: [n, t, 2] positions, [n, t-1, 2] actions, [n] rooms."""

    positions: Float32[np.ndarray, "n t 2"]
    actions: Float32[np.ndarray, "n t-1 2"]
    wall: Float32[np.ndarray, " n"]
    door: Float32[np.ndarray, " n"]


class TwoRoomsData(GeneratedData[TwoRoomsConfig]):
    """Windows of walks.

    The seed's `data/two_rooms` stream gives the training windows, `eval/two_rooms` others.
    """

    item = "window"

    def __init__(self, config: TwoRoomsConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.round = lru_cache(2)(self.draw_round)  # the one in use, and the next

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's windows of the batch of `step`: the fields of `Walks`."""
        config = self.config
        steps = config.walks * (config.walk // config.seq_len) // config.batch_size
        number, within = divmod(step, steps)
        here = slice(within * config.batch_size, (within + 1) * config.batch_size)
        windows = self.round(number)
        return {name: self.mine(rows[here]) for name, rows in windows._asdict().items()}

    def draw_round(self, number: int) -> Walks:
        """The shuffled windows of one round of walks."""
        rng = numpy_rng(self._seed, "data/two_rooms", number)
        windows = cut(self.config, rng, walk(self.config, rng, self.config.walks))
        count = len(windows.wall)
        order = permute(
            np.arange(count), count, stream_seed(self._seed, "data/two_rooms_order", number)
        )
        return Walks(*(rows[order] for rows in windows))

    def heldout(self, count: int, length: int | None = None) -> Walks:
        """`count` fresh windows, each of a walk of its own, the same for every model of the seed.

        Args:
            length: states of a window, up to data.walk; None is data.seq_len.
        """
        length = length or self.config.seq_len
        walks = walk(self.config, numpy_rng(self._seed, "eval/two_rooms", length), count)
        positions, actions = walks.positions[:, :length], walks.actions[:, : length - 1]
        return Walks(positions, actions, walks.wall, walks.door)


def walk(config: TwoRoomsConfig, rng: np.random.Generator, count: int) -> Walks:
    """`count` walks of data.walk states."""
    wall, door = draw_rooms(config.wall, rng, count)
    rooms = Rooms(torch.from_numpy(wall), torch.from_numpy(door))
    crossing = rng.random(count) < config.crossing
    start = np.where(crossing[:, None], in_doorway(rng, wall, door), in_room(rng, wall, door))
    heading = np.where(
        crossing, rng.uniform(-np.pi / 4, np.pi / 4, count), rng.uniform(-np.pi, np.pi, count)
    )
    positions, actions = stroll(rng, start, heading, rooms, config.walk - 1)

    some = np.flatnonzero(crossing)
    away = np.pi + rng.uniform(-np.pi / 4, np.pi / 4, len(some))
    left, steps = stroll(rng, start[some], away, rooms[some], config.walk - 1)
    left, steps = backwards(left, steps)
    # [2 walk - 1] states around the doorway, of which a stretch of data.walk holds the middle.
    states = np.concatenate([left, positions[some, 1:]], axis=1)
    steps = np.concatenate([steps, actions[some]], axis=1)
    first = rng.integers(config.walk, size=len(some))[:, None] + np.arange(config.walk)
    states = np.take_along_axis(states, first[..., None], axis=1)
    steps = np.take_along_axis(steps, first[:, :-1, None], axis=1)
    turned = rng.random((len(some), 1, 1)) < 0.5
    states_back, steps_back = backwards(states, steps)
    positions[some] = np.where(turned, states_back, states)
    actions[some] = np.where(turned, steps_back, steps)
    return Walks(positions, actions, wall, door)


def stroll(
    rng: np.random.Generator, start: np.ndarray, heading: np.ndarray, rooms: Rooms, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Walk from `start`: positions [n, steps + 1, 2] and actions [n, steps, 2]."""
    count = len(start)
    turns = rng.vonmises(0.0, KAPPA, (count, steps))
    turns[:, 0] = heading
    heading = np.cumsum(turns, axis=1)
    length = truncated_normal(
        rng, (count, steps), LENGTH, LENGTH_SPREAD, np.array([SHORTEST, LONGEST])
    )
    actions = length[..., None] * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    taken = torch.from_numpy(actions.astype(np.float32))
    states = [torch.from_numpy(start.astype(np.float32))]
    for step in range(steps):
        states.append(move(states[-1], taken[:, step], rooms))
    return torch.stack(states, dim=1).numpy(), taken.numpy()


def backwards(positions: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same walk from its end to its beginning."""
    blocked = (positions[:, 1:] == positions[:, :-1]).all(-1, keepdims=True)
    turned = np.where(blocked, actions, -actions)
    return positions[:, ::-1], turned[:, ::-1]


def draw_rooms(
    kind: Wall, rng: np.random.Generator, count: int
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Walls and doors."""
    if kind == Wall.fixed:
        wall, door = np.full(count, FIXED[0]), np.full(count, FIXED[1])
    else:
        wall = rng.integers(*WALLS, size=count, endpoint=True)
        door = rng.integers(*DOORS, size=count, endpoint=True)
    return wall.astype(np.float32), door.astype(np.float32)


def layouts(kind: Wall) -> tuple[np.ndarray, np.ndarray]:
    """Every wall and door that `draw_rooms` can give."""
    if kind == Wall.fixed:
        wall, door = np.array([FIXED[0]]), np.array([FIXED[1]])
    else:
        wall, door = np.meshgrid(
            np.arange(WALLS[0], WALLS[1] + 1), np.arange(DOORS[0], DOORS[1] + 1)
        )
    return wall.ravel().astype(np.float32), door.ravel().astype(np.float32)


def in_room(rng: np.random.Generator, wall: np.ndarray, door: np.ndarray) -> np.ndarray:
    """[n, 2] points between the borders that are not in the wall."""
    points = rng.uniform(LOW, HIGH, (len(wall), 2))
    rooms = Rooms(torch.from_numpy(wall), torch.from_numpy(door))
    while (bad := solid(points, rooms)).any():
        points[bad] = rng.uniform(LOW, HIGH, (bad.sum(), 2))
    return points


def solid(points: np.ndarray, rooms: Rooms) -> Bool[np.ndarray, " n"]:
    return is_solid(torch.from_numpy(points), rooms).numpy()


def in_doorway(rng: np.random.Generator, wall: np.ndarray, door: np.ndarray) -> np.ndarray:
    """[n, 2] points in the doorway."""
    x = rng.uniform(wall - HALF_WALL, wall + HALF_WALL)
    y = truncated_normal(
        rng, wall.shape, door, DOORWAY_SPREAD, door + HALF_DOOR * np.array([[-1], [1]])
    )
    return np.stack([x, y], axis=-1)


def truncated_normal(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    mean: np.ndarray | float,
    std: float,
    bounds: np.ndarray,
) -> np.ndarray:
    """Normal numbers drawn again until they lie between bounds[0] and bounds[1]."""
    found = rng.normal(mean, std, shape)
    low, high, mean = (np.broadcast_to(x, shape) for x in (bounds[0], bounds[1], mean))
    while (bad := (found <= low) | (found >= high)).any():
        found[bad] = rng.normal(mean[bad], std)
    return found


def cut(config: TwoRoomsConfig, rng: np.random.Generator, walks: Walks) -> Walks:
    """All windows of data.seq_len states that fit side by side, from a random first state on."""
    length, count = config.seq_len, len(walks.wall)
    fit = config.walk // length
    first = rng.integers(config.walk - fit * length, size=count, endpoint=True)
    index = (first[:, None] + np.arange(fit * length)).reshape(count, fit, length)
    rows = np.arange(count)[:, None, None]
    positions, actions = walks.positions[rows, index], walks.actions[rows, index[..., :-1]]
    return Walks(
        positions.reshape(-1, length, 2),
        actions.reshape(-1, length - 1, 2),
        np.repeat(walks.wall, fit),
        np.repeat(walks.door, fit),
    )
