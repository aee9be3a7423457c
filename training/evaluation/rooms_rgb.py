"""Episodes in the coloured rooms: who comes near a goal that a walk reached 25 steps later.

The rule of stable-worldmodel's TwoRoom-v1, by which LeWorldModel (2026, arXiv:2603.19312) was
judged: start and goal are two states of one held-out walk, an episode has 50 steps, and it counts
as soon as the dot is within 16 pixels, ever. Some starts are that near already, and random actions
reach a good part of the rest, so no rate means anything without those of the same episodes:

    model          blocks of actions whose predicted latent is nearest to that of the goal's image
    random, zero   uniform actions, and none
    true_dynamics  the same planner with the true dynamics and the straight distance
    oracle         knows the way
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.worlds.planners import Cost, Replanning
from training.data.config_worlds import TwoRoomsRGBConfig
from training.data.two_rooms_rgb import TwoRoomsRGBData
from training.envs.two_rooms_rgb import CANVAS, NEAR, move, towards
from training.errors import UserError
from training.evaluation.planning import PlanningModel, over_horizon, planner_of
from training.evaluation.statistics import wilson_interval
from training.evaluation.surprise import Film
from training.recipes.config_worlds import LeWMRecipeConfig
from training.seeding import numpy_rng, torch_generator

Act = Callable[[Float[Tensor, "n 2"], int], Float[Tensor, "n m 2"]]
"From positions and the number of blocks that are left: the next actions, in [-1, 1]."
SHOWN = 6  # episodes whose ways are kept


@dataclass(frozen=True)
class Episodes:
    """Starts and goals [n, 2]."""

    start: Float[Tensor, "n 2"]
    goal: Float[Tensor, "n 2"]


def draw_episodes(
    data: TwoRoomsRGBData, rng: np.random.Generator, count: int, ahead: int
) -> Episodes:
    """Two states, `ahead` steps apart, of each of `count` held-out walks."""
    positions = data.heldout(count).positions
    first = rng.integers(positions.shape[1] - ahead, size=count)
    rows = np.arange(count)
    return Episodes(*(torch.from_numpy(positions[rows, first + step]) for step in (0, ahead)))


@dataclass
class Policies:
    """Everyone who can act in `episodes`, by name.

    Args:
        see: positions [n, t, 2] -> frames [n, t, 3, s, s].
    """

    episodes: Episodes
    world: PlanningModel
    see: Callable[[Float[Tensor, "n t 2"]], Tensor]
    recipe: LeWMRecipeConfig
    data: TwoRoomsRGBData
    generator: torch.Generator

    def raw(self, blocks: Float[Tensor, "*n m k"]) -> Float[Tensor, "*n s 2"]:
        """Actions in [-1, 1] that normalised blocks stand for."""
        mean, std = (
            torch.from_numpy(x).to(blocks.device)
            for x in (self.data.action_mean, self.data.action_std)
        )
        actions = blocks.unflatten(-1, (-1, 2)).flatten(-3, -2)
        return (actions * std + mean).clamp(-1, 1)

    def planned(self, cost_from: Callable[[Float[Tensor, "n 2"]], Cost]) -> Act:
        planning = self.recipe.planning
        control = Replanning(planner_of(planning), planning.horizon, planning.replan)
        width = 2 * self.data.config.skip

        def act(position: Tensor, left: int) -> Tensor:
            count = len(position)
            cost = cost_from(position)
            return self.raw(control.next(cost, count, width, left, position, self.generator))

        return act

    def model(self) -> Act:
        goal = self.latent(self.episodes.goal)

        def cost_from(position: Tensor) -> Cost:
            z = self.latent(position)

            def cost(blocks: Tensor) -> Tensor:
                states = self.world.imagine(z, blocks)  # [n, k, h, d]
                distances = (states - goal[:, None, None]).square().sum(-1)
                return over_horizon(distances, self.recipe.planning.cost)

            return cost

        return self.planned(cost_from)

    def latent(self, position: Float[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
        return self.world.encode(self.see(position[:, None]))[:, 0]

    def true_dynamics(self) -> Act:
        goal, skip = self.episodes.goal[:, None, None], self.data.config.skip

        def cost_from(position: Tensor) -> Cost:
            def cost(blocks: Tensor) -> Tensor:
                path = [position[:, None].expand(-1, blocks.shape[1], -1)]
                for action in self.raw(blocks).unbind(dim=2):
                    path.append(move(path[-1], action))
                states = torch.stack(path[skip::skip], dim=2)
                return over_horizon((states - goal).norm(dim=-1), self.recipe.planning.cost)

            return cost

        return self.planned(cost_from)

    def random(self) -> Act:
        def act(position: Tensor, left: int) -> Tensor:
            shape = len(position), self.data.config.skip, 2
            drawn = torch.rand(shape, generator=self.generator, device=position.device)
            return 2 * drawn - 1

        return act

    def zero(self) -> Act:
        return lambda position, left: position.new_zeros(len(position), self.data.config.skip, 2)

    def oracle(self) -> Act:
        return lambda position, left: towards(position, self.episodes.goal)[:, None]


def play(act: Act, episodes: Episodes, steps: int, skip: int) -> Float[Tensor, "n t 2"]:
    """Where the dot was, from the start on; nothing ends early."""
    positions = [episodes.start]
    while (done := len(positions) - 1) < steps:
        for action in act(positions[-1], -(-(steps - done) // skip)).unbind(dim=1):
            positions.append(move(positions[-1], action))
    return torch.stack(positions[: steps + 1], dim=1)


def judge(positions: Float[Tensor, "n t 2"], goal: Float[Tensor, "n 2"]) -> dict[str, Any]:
    """Rate by the published rule with Wilson's interval; where it was at the end; who began
    there."""
    near = (positions - goal[:, None]).norm(dim=-1) < NEAR  # [n, t]
    reached, count = int(near.any(dim=1).sum()), len(goal)
    low, high = wilson_interval(reached, count)
    return {
        "ever": reached / count,
        "low": low,
        "high": high,
        "final": near[:, -1].float().mean().item(),
        "at_start": near[:, 0].float().mean().item(),
        "distance": (positions[:, -1] - goal).norm(dim=-1).mean().item(),
        "episodes": count,
    }


def evaluate_policies(
    policies_of: Callable[[Episodes, torch.Generator], Policies],
    data: TwoRoomsRGBData,
    recipe: LeWMRecipeConfig,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """What `judge` says of every policy of the recipe, and the ways of some episodes, flat."""
    rng = numpy_rng(seed, "eval/episodes")
    drawn = draw_episodes(data, rng, recipe.episodes, recipe.goal_steps)
    episodes = Episodes(*(x.to(device) for x in (drawn.start, drawn.goal)))
    rates, series = {}, {"paths/goals": episodes.goal[:SHOWN].flatten().tolist()}
    for name in recipe.policies:
        generator = torch_generator(seed, f"eval/plan/{name}", device=device)
        act = getattr(policies_of(episodes, generator), name)()
        positions = play(act, episodes, recipe.episode_steps, data.config.skip)
        rates[name] = judge(positions, episodes.goal)
        if name in ("model", "random"):
            series[f"paths/{name}"] = positions[:SHOWN].flatten().tolist()
    return rates, series


def headline(rates: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The rate of every policy, and how many episodes were over before they began."""
    found = {f"eval/{name}": rate["ever"] for name, rate in rates.items()}
    return found | {"eval/at_start": rate["at_start"] for rate in rates.values()}  # noqa: B035


def check(recipe: LeWMRecipeConfig, data: TwoRoomsRGBConfig) -> None:
    """Raise UserError unless plans and goals fit the episodes and the walks."""
    budget = -(-recipe.episode_steps // data.skip)
    if recipe.planning.horizon > budget:
        raise UserError(
            f"recipe.planning.horizon={recipe.planning.horizon} blocks of data.skip={data.skip} "
            f"steps reach beyond recipe.episode_steps={recipe.episode_steps}: lower it to {budget}"
        )
    if recipe.goal_steps >= data.walk:
        raise UserError(
            f"recipe.goal_steps={recipe.goal_steps} must be fewer than data.walk={data.walk} states"
        )


def violations(
    see: Callable[[Tensor], Tensor],
    positions: Float[Tensor, "n t 2"],
    actions: Float[Tensor, "n t-1 k"],
    generator: torch.Generator,
) -> dict[str, tuple[Film, Film]]:
    """Event -> (possible, impossible) films of the same walks.

    teleport: the dot is elsewhere from the middle on; colour: it is blue from there on; reversed:
    the walk is told backwards, each block's actions too.
    """
    count, length = positions.shape[:2]
    middle, frames = length // 2, see(positions)
    late = torch.arange(length, device=positions.device) >= middle
    possible, found = Film(frames, actions), {}
    other = positions[torch.randperm(count, generator=generator, device=positions.device)]
    away = (other[:, middle] - positions[:, middle]).norm(dim=-1) > CANVAS / 4
    moved = torch.where(late[:, None], positions + (other - positions)[:, middle, None], positions)
    some = Film(frames[away], actions[away])
    found["teleport"] = some, Film(see(moved[away].clamp(22, 202)), actions[away])
    blue = torch.where(late[:, None, None, None], frames.flip(2), frames)
    found["colour"] = possible, Film(blue, actions)
    backwards = -actions.flip(1).unflatten(-1, (-1, 2)).flip(-2).flatten(-2)
    found["reversed"] = possible, Film(see(positions.flip(1)), backwards)
    return found
