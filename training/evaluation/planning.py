"""Episodes in two rooms: who reaches the goal in the other one, beside whom.

A rate says little by itself: a walk along the straight line already reaches some goals, and how
many depends on the rule for contacts. So every policy plays the same episodes by the same rule:

    model                      plans with the learned model and the distance of its latents
    random, zero               the floors of doing anything, and nothing
    greedy                     steps straight to the goal, whatever stands between
    oracle                     walks to the door, then to the goal
    true_dynamics              the model's planner on the true dynamics and the straight distance:
                               what perfect prediction is worth without a learned distance
    true_dynamics_latent_cost  the same with the distance of the model's latents: what its geometry
                               is worth without its predictions

Plans always assume the rule of the training data (`block`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.worlds.planners import (
    CEM,
    ICEM,
    MPPI,
    Adam,
    Cost,
    Planner,
    RandomPlanner,
    Replanning,
    ZeroPlanner,
    within_norm,
)
from training.data.config_worlds import Wall
from training.data.two_rooms import draw_rooms
from training.envs.two_rooms import (
    CLEAR,
    HALF_WALL,
    HIGH,
    LOW,
    MAX_STEP,
    NEAR,
    Contact,
    Rooms,
    blocks,
    move,
)
from training.evaluation.statistics import wilson_interval
from training.recipes.config_worlds import PlanCost, PlannerKind, PlanningConfig

GRID_STEP = 0.5  # pixels between the points at which latent distances are tabulated


class PlanningModel(Protocol):
    """What planning asks of a model of the world."""

    def encode(self, frames: Tensor) -> Tensor: ...
    def imagine(self, z: Tensor, actions: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Episodes:
    """Starts and goals [n, 2] in opposite rooms."""

    start: Float[Tensor, "n 2"]
    goal: Float[Tensor, "n 2"]
    rooms: Rooms

    def __getitem__(self, index: slice) -> Episodes:
        return Episodes(self.start[index], self.goal[index], self.rooms[index])

    def to(self, device: torch.device) -> Episodes:
        return Episodes(self.start.to(device), self.goal.to(device), self.rooms.to(device))


@dataclass(frozen=True)
class Played:
    """Where the dot was: [n, steps + 1, 2]."""

    positions: Float[Tensor, "n t 2"]
    goal: Float[Tensor, "n 2"]

    def judge(self) -> dict[str, Any]:
        """Rates with Wilson's interval, steps to the goal where it was reached, distance left."""
        distance = (self.positions - self.goal[:, None]).norm(dim=-1)  # [n, t]
        near = distance < NEAR
        final, ever = near[:, -1], near.any(dim=1)
        steps = near.float().argmax(dim=1)[ever].float()
        count, reached = len(final), int(final.sum())
        low, high = wilson_interval(reached, count)
        return {
            "final": reached / count,
            "low": low,
            "high": high,
            "ever": ever.float().mean().item(),
            "steps_to_goal": steps.mean().item() if len(steps) else None,
            "distance": distance[:, -1].mean().item(),
            "episodes": count,
        }


Act = Callable[[Float[Tensor, "n 2"], int], Float[Tensor, "n m 2"]]
"From positions and the number of steps that are left: the next actions."


def draw_episodes(kind: Wall, rng: np.random.Generator, count: int) -> Episodes:
    """Starts and goals away from walls, in opposite rooms, in either direction."""
    wall, door = draw_rooms(kind, rng, count)
    low, high = LOW + CLEAR, HIGH - CLEAR
    left = rng.uniform(low, wall - HALF_WALL - CLEAR)
    right = rng.uniform(wall + HALF_WALL + CLEAR, high)
    y = rng.uniform(low, high, (2, count))
    ends = np.stack([np.stack([left, y[0]], -1), np.stack([right, y[1]], -1)])  # [2, n, 2]
    ends = torch.from_numpy(ends.astype(np.float32))
    flip = torch.from_numpy(rng.random((count, 1)) < 0.5)
    return Episodes(
        torch.where(flip, ends[1], ends[0]),
        torch.where(flip, ends[0], ends[1]),
        Rooms(torch.from_numpy(wall), torch.from_numpy(door)),
    )


def play(
    act: Act, episodes: Episodes, contact: Contact, steps: int, rng: np.random.Generator
) -> Played:
    """Carry out what `act` says for so many steps; nothing ends early."""
    noise = torch.from_numpy(rng.standard_normal((steps, len(episodes.start), 2), np.float32))
    noise = noise.to(episodes.start.device)
    positions = [episodes.start]
    while (done := len(positions) - 1) < steps:
        for action in act(positions[-1], steps - done).unbind(dim=1):
            here = positions[-1]
            positions.append(move(here, action, episodes.rooms, contact, noise[len(positions) - 1]))
    return Played(torch.stack(positions, dim=1), episodes.goal)


def planner_of(config: PlanningConfig) -> Planner:
    """The planner that a configuration names."""
    holds, norm = tuple(config.holds), config.max_norm
    sampling = {"samples": config.samples, "iterations": config.iterations, "std": config.std}
    if config.kind in (PlannerKind.cem, PlannerKind.icem):
        kind = CEM if config.kind == PlannerKind.cem else ICEM
        return kind(
            **sampling,
            elites=config.elites,
            max_norm=norm,
            holds=holds,
            fresh=config.fresh,
            best=config.best,
        )
    if config.kind == PlannerKind.mppi:
        return MPPI(**sampling, temperature=config.temperature, max_norm=norm, holds=holds)
    return Adam(**sampling, lr=config.lr, max_norm=norm, holds=holds)


def over_horizon(distances: Float[Tensor, "b k h"], cost: PlanCost) -> Float[Tensor, "b k"]:
    return distances.sum(-1) if cost == PlanCost.sum else distances[..., -1]


@dataclass
class Policies:
    """Everyone who can act in `episodes`, by name.

    Args:
        see: positions [n, t, 2] -> frames [n, t, c, s, s], in the rooms of the episodes.
    """

    episodes: Episodes
    world: PlanningModel
    see: Callable[[Float[Tensor, "n t 2"], Rooms], Tensor]
    config: PlanningConfig
    generator: torch.Generator

    def named(self, name: str) -> Act:
        """The policy of that name, at the beginning of its episodes."""
        return getattr(self, name)()

    def planned(self, cost_from: Callable[[Float[Tensor, "n 2"]], Cost]) -> Act:
        """Replanning with a cost that depends on where the dot is."""
        control = Replanning(planner_of(self.config), self.config.horizon, self.config.replan)

        def act(position: Tensor, left: int) -> Tensor:
            count = len(position)
            return control.next(cost_from(position), count, 2, left, position, self.generator)

        return act

    def model(self) -> Act:
        return self.planned(self.imagined_cost)

    def imagined_cost(self, position: Float[Tensor, "n 2"]) -> Cost:
        """Costs of sequences of actions, from there, by the model's own predictions."""
        z, goal = self.latent(position), self.latent(self.episodes.goal)  # [n, d]

        def cost(actions: Tensor) -> Tensor:
            states = self.world.imagine(z, actions)  # [n, k, h, d]
            distances = (states - goal[:, None, None]).square().mean(-1)
            return over_horizon(distances, self.config.cost)

        return cost

    def held_costs(self, bound: float, steps: int, points: int) -> Float[Tensor, "n y x"]:
        """Imagined cost of holding an action from the start on, over its components."""
        axis = torch.linspace(-bound, bound, points, device=self.episodes.start.device)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        actions = torch.stack([x, y], dim=-1).view(1, -1, 1, 2)
        actions = actions.expand(len(self.episodes.start), -1, steps, -1)
        cost = self.imagined_cost(self.episodes.start)(actions)
        return cost.unflatten(1, (points, points))

    def latent(self, position: Float[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
        return self.world.encode(self.see(position[:, None], self.episodes.rooms))[:, 0]

    def true_dynamics(self) -> Act:
        goal = self.episodes.goal[:, None, None]
        return self.planned(self.truly(lambda path: (path - goal).norm(dim=-1)))

    def true_dynamics_latent_cost(self) -> Act:
        return self.planned(self.truly(self.tabulated(self.latent_distances())))

    def tabulated(self, table: Float[Tensor, "n y x"]) -> Callable[[Tensor], Tensor]:
        """Places [n, k, h, 2] -> what the table of a grid says there, linear between its points."""

        def look_up(places: Tensor) -> Tensor:
            there = 2 * (places - LOW) / (HIGH - LOW) - 1  # grid_sample's coordinates
            return F.grid_sample(table[:, None], there, align_corners=True)[:, 0]

        return look_up

    def truly(self, distance: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Cost]:
        """Costs of sequences of actions under the true dynamics."""
        rooms = self.episodes.rooms[:, None]

        def cost_from(position: Tensor) -> Cost:
            def cost(actions: Tensor) -> Tensor:
                path = [position[:, None].expand(-1, actions.shape[1], -1)]
                for action in actions.unbind(dim=2):
                    path.append(move(path[-1], action, rooms))
                return over_horizon(distance(torch.stack(path[1:], dim=2)), self.config.cost)

            return cost

        return cost_from

    def latent_distances(self) -> Float[Tensor, "n y x"]:
        """Squared distance of the goal's latent from that of every point of a grid."""
        axis = torch.arange(LOW, HIGH + GRID_STEP / 2, GRID_STEP, device=self.episodes.goal.device)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        points = torch.stack([x, y], dim=-1)  # [y, x, 2]
        goals, found = self.latent(self.episodes.goal), []
        for i, goal in enumerate(goals):
            if i == 0 or not self.same_rooms():
                seen = [
                    self.world.encode(self.see(row[None], self.episodes.rooms[i : i + 1]))[0]
                    for row in points
                ]
                grid = torch.stack(seen)  # [y, x, d]
            found.append((grid - goal).square().mean(-1))
        return torch.stack(found)

    def same_rooms(self) -> bool:
        rooms = self.episodes.rooms
        return bool((rooms.wall == rooms.wall[0]).all() and (rooms.door == rooms.door[0]).all())

    def unplanned(self, planner: Planner) -> Act:
        """What a planner does that asks no cost, a step at a time."""

        def act(position: Tensor, left: int) -> Tensor:
            nowhere = torch.zeros_like(position[:, None])
            free = lambda actions: actions.new_zeros(actions.shape[:2])  # noqa: E731
            return planner(free, nowhere, self.generator).actions

        return act

    def random(self) -> Act:
        return self.unplanned(RandomPlanner(MAX_STEP))

    def zero(self) -> Act:
        return self.unplanned(ZeroPlanner())

    def greedy(self) -> Act:
        norm = self.config.max_norm
        return lambda position, left: within_norm(self.episodes.goal - position, norm)[:, None]

    def oracle(self) -> Act:
        rooms, goal = self.episodes.rooms, self.episodes.goal

        def act(position: Tensor, left: int) -> Tensor:
            # To the door's middle in front of the wall, through it, and on.
            side = (rooms.wall - goal[:, 0]).sign()  # of the start, seen from the goal
            gap = HALF_WALL + 1.0
            before = torch.stack([rooms.wall + side * gap, rooms.door], -1)
            behind = torch.stack([rooms.wall - side * gap, rooms.door], -1)
            aim = torch.where(blocks(position, behind, rooms)[:, None], before, behind)
            aim = torch.where(blocks(position, goal, rooms)[:, None], aim, goal)
            return within_norm(aim - position, self.config.max_norm)[:, None]

        return act


def evaluate_policies(
    model: PlanningModel,
    see: Callable[[Float[Tensor, "n t 2"], Rooms], Tensor],
    episodes: Episodes,
    config: PlanningConfig,
    names: list[str],
    contacts: list[str],
    steps: int,
    seed: Callable[[str], int],
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Played]]]:
    """Contact rule -> policy -> rates, and the paths.

    Args:
        seed: a stream's name -> seed; every policy meets the same noise of contacts.
    """
    device = episodes.start.device
    rates: dict[str, dict[str, Any]] = {}
    paths: dict[str, dict[str, Played]] = {}
    for contact in contacts:
        rates[contact], paths[contact] = {}, {}
        for name in names:
            generator = torch.Generator(device=device).manual_seed(seed(f"plan/{contact}/{name}"))
            policies = Policies(episodes, model, see, config, generator)
            act = policies.named(name)
            rng = np.random.default_rng(seed(f"contact/{contact}"))
            played = play(act, episodes, Contact(contact), steps, rng)
            rates[contact][name], paths[contact][name] = played.judge(), played
    return rates, paths
